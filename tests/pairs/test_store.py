"""A write lands whole or not at all, on local disk and in memory; what is read is what was written."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from pairs.errors import PairmillError
from pairs.store import TEMPORARY, Store, table_metadata

TABLE = pa.table({"uid": ["a", "b"], "score": pa.array([0.5, None], pa.float32())})


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, memory_store: Store) -> Store:
    return Store(tmp_path / "store") if request.param == "local" else memory_store


def leftovers(store: Store) -> list[str]:
    return [path.name for path in store.local.rglob(f"{TEMPORARY}*")] if store.local else []


def test_what_is_written_is_read(store: Store) -> None:
    assert not store.has("a/b.bin")
    store.write("a/b.bin", bytes(range(100)))
    store.write("a/text.txt", "½")
    assert store.has("a/b.bin") and not store.has("a") and store.size("a/b.bin") == 100
    assert store.read("a/b.bin") == bytes(range(100))
    assert store.read("a/text.txt").decode() == "½"
    store.write("a/b.bin", b"new")
    assert store.read("a/b.bin") == b"new"


def test_ranges(store: Store) -> None:
    store.write("x", bytes(range(100)))
    assert store.read("x", 10, 5) == bytes(range(10, 15))
    assert store.read("x", 0, 3) == bytes(range(3))
    assert store.read("x", 90) == bytes(range(90, 100))
    assert store.read("x", 50, 0) == b"" == store.read("x", 0, 0)


def test_listing(store: Store) -> None:
    for path in ("pairs/web-1/0001/00000.tar", "pairs/web-1/0000/00001.tar", "pairs/web-10/0000/00000.tar", "other"):
        store.write(path, b"x")
    store.write("pairs/web-1/0000/00000.parquet", b"x")
    assert store.files("pairs/web-1", ".tar") == ["pairs/web-1/0000/00001.tar", "pairs/web-1/0001/00000.tar"]
    assert len(store.files("pairs")) == 4 and len(store.files("")) == 5
    assert store.files("nothing") == [] == store.folders("nothing")
    assert store.folders("pairs") == ["web-1", "web-10"]
    assert store.folders("pairs/web-1") == ["0000", "0001"]
    store.delete("pairs/web-1", recursive=True)
    store.delete("pairs/web-1")
    assert store.folders("pairs") == ["web-10"]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", ".."])
def test_paths_stay_inside(store: Store, path: str) -> None:
    for call in (store.read, store.has, store.files, store.delete, lambda p: store.write(p, b"")):
        with pytest.raises(PairmillError, match="inside the workspace"):
            call(path)


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_inside_writing_leaves_what_was_there(store: Store, before: bytes | None) -> None:
    if before:
        store.write("a/x", before)
    with pytest.raises(RuntimeError, match="half way"), store.writing("a/x") as file:
        file.write(b"half" * 100_000)
        file.flush()
        assert store.files("") == (["a/x"] if before else [])  # an unfinished file is no file
        raise RuntimeError("half way")
    assert (store.read("a/x") if store.has("a/x") else None) == before
    assert leftovers(store) == []


def test_nothing_is_left_in_the_temporary_folder(
    memory_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory_store.write("x", b"1")
    with pytest.raises(RuntimeError), memory_store.writing("y"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [] and not memory_store.has("y")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which refuses every write")
@pytest.mark.parametrize("what", ["bytes", "table"])
def test_a_full_disk_is_said_and_nothing_published(
    store: Store, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("x", b"old")

    def full(prefix: str, dir: Path | None) -> tuple[int, str]:
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / f"{prefix}name")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(PairmillError, match="no space left") as caught:
        store.write("x", b"y" * 1_000_000) if what == "bytes" else store.write_table("x", TABLE)
    assert "x" in caught.value.expected and "same command again" in caught.value.remedy
    assert store.read("x") == b"old" and leftovers(store) == []


def test_a_file_system_that_really_is_full(tmp_path: Path) -> None:
    """A tmpfs of 256 KiB in a mount namespace of its own, where this machine lets us make one."""
    code = """if True:
        import sys
        from pairs.store import Store
        from pairs.errors import PairmillError
        store = Store(sys.argv[1])
        store.write("small", b"x")
        try:
            store.write("big", b"x" * 1_000_000)
        except PairmillError as error:
            print(error.found, store.files(""), store.sweep())"""
    shell = f'mount -t tmpfs -o size=256k tmpfs "{tmp_path}" || exit 77; exec "$0" -c "$1" "{tmp_path}"'
    command = ["unshare", "-rm", "sh", "-c", shell, sys.executable, code]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.stdout == "no space left on the device; nothing was published ['small'] 0\n", done.stderr


def test_other_write_errors_keep_their_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as caught:
        Store(tmp_path).write("file/below", b"x")
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_a_writer_killed_in_mid_write_leaves_no_file(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        from pairs.store import Store
        with Store(sys.argv[1]).writing("a/x") as file:
            file.write(b"half" * 100_000)
            file.flush()
            print("writing", flush=True)
            time.sleep(60)"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    store = Store(tmp_path)
    assert not store.has("a/x") and store.files("") == []
    assert len(leftovers(store)) == 1
    assert store.sweep() == 1 and leftovers(store) == []
    store.write("a/x", b"whole")
    assert store.sweep() == 0 and store.read("a/x") == b"whole"


def test_sweep_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_bytes(b"x")
    store = Store(tmp_path / "store")
    store.write("kept", b"x")
    (tmp_path / "store" / f"{TEMPORARY}folder").mkdir()
    (tmp_path / "store" / f"{TEMPORARY}folder" / "x").write_bytes(b"x")
    (tmp_path / "store" / f"{TEMPORARY}link").symlink_to(tmp_path / "outside")
    assert store.sweep() == 2
    assert store.files("") == ["kept"] and (tmp_path / "outside" / "precious").exists()


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    Store(tmp_path).write("x", b"x")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_a_table_and_its_metadata(store: Store) -> None:
    store.write_table("t.parquet", TABLE, {"rows": "2"})
    table = store.read_table("t.parquet")
    assert table.equals(TABLE) and table_metadata(table) == {"rows": "2"}
    assert store.read_table("t.parquet", ["score"]).column_names == ["score"]
    store.write_table("again.parquet", TABLE, {"rows": "2"})
    assert store.read("again.parquet") == store.read("t.parquet")
    assert table_metadata(TABLE) == {}


def test_a_damaged_table_is_refused_by_name(store: Store) -> None:
    store.write_table("t.parquet", pa.table({"uid": [f"{i:032x}" for i in range(200)]}))
    whole = store.read("t.parquet")
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], b"PAR1" + bytes(500) + b"PAR1"):
        store.write("bad.parquet", damaged)
        with pytest.raises(PairmillError, match=r"bad\.parquet"):
            store.read_table("bad.parquet")


def test_a_flipped_bit_never_changes_what_is_read(memory_store: Store) -> None:
    table = pa.table({"score": pa.array([i / 7 for i in range(500)])})
    memory_store.write_table("t.parquet", table)
    whole, seen, places = memory_store.read("t.parquet"), 0, range(30, 1500, 49)  # all of its pages
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        memory_store.write("bad.parquet", bytes(damaged))
        try:
            assert memory_store.read_table("bad.parquet").equals(table)  # the statistics in a page's header
        except PairmillError as error:
            assert "bad.parquet" in error.expected
            seen += 1
    assert seen > 0.9 * len(places)


def test_a_store_travels_to_workers(store: Store, tmp_path: Path) -> None:
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


def test_a_relative_root_means_the_same_place_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("here/")
    store.write("x", b"1")
    parcel = pickle.dumps(store)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(parcel).read("x") == b"1" and store.read("x") == b"1"


def test_spellings_of_a_root(tmp_path: Path) -> None:
    Store(tmp_path).write("x", b"1")
    assert Store(f"{tmp_path}/").has("x") and Store(f"file://{tmp_path}").has("x")
    assert Store(f"file://{tmp_path}").local == tmp_path
    bare = Store("memory://")
    assert bare.local is None
    bare.write("only-here", b"1")
    assert fsspec.filesystem("memory").cat("/only-here") == b"1" and "only-here" in bare.files("")
    bare.delete("only-here")


def test_what_another_process_writes_is_seen(tmp_path: Path, memory_store: Store) -> None:
    """File systems of object stores cache listings unless they are told not to."""
    for store in (Store(tmp_path), memory_store):
        assert store.fs.dircache.use_listings_cache is False


def test_a_table_cut_short_by_damage_is_refused(memory_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_store.write_table("t.parquet", TABLE)
    monkeypatch.setattr("pairs.store.pq.read_table", lambda *_, **__: TABLE[:1])
    with pytest.raises(PairmillError, match="1 rows where its footer says 2"):
        memory_store.read_table("t.parquet")


def test_an_open_reader_keeps_the_whole_old_file(tmp_path: Path) -> None:
    """The new file is renamed into place, never written over the old one."""
    store = Store(tmp_path)
    store.write("x", b"old" * 1000)
    with (tmp_path / "x").open("rb") as reader:
        store.write("x", b"new")
        assert reader.read() == b"old" * 1000


@pytest.mark.parametrize("address", ["s3://bucket/work", "nowhere://work"])
def test_a_file_system_that_is_not_there_is_advice(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # not installed, wherever this runs
    with pytest.raises(PairmillError, match="local folder") as error:
        Store(address)
    assert address in error.value.expected


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_forbidden_write_is_advice(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(prefix: str, dir: Path | None) -> tuple[int, str]:
        raise OSError(number, os.strerror(number), str(dir))

    monkeypatch.setattr(tempfile, "mkstemp", forbidden)
    with pytest.raises(PairmillError, match="permission") as error:
        Store(tmp_path).write("x", b"1")
    assert str(tmp_path) in error.value.expected
