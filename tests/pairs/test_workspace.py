"""One writer at a time, one format, no foreign folders, and the dead stay dead."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from pairs import FORMAT_VERSION
from pairs.errors import PairmillError
from pairs.schemas import CANDIDATES, PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import TEMPORARY, Store
from pairs.workspace import KINDS, MARK, Workspace
from tests.pairs.small import image, pair_row

HOLD = """if True:
    import sys
    from pairs.workspace import Workspace
    with Workspace.open(sys.argv[1]).lock():
        print("held", flush=True)
        sys.stdin.readline()"""


@contextmanager
def another_writer(root: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", HOLD, root], stdin=pipe, stdout=pipe, text=True)
    with child:
        assert child.stdout and child.stdout.readline() == "held\n"
        try:
            yield child
        finally:
            child.kill()


def test_open_makes_it_once(tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match=r"no workspace\.json there"):
        Workspace.open(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    Workspace.open(tmp_path / "new", create=True).store.write("x", b"kept")
    assert json.loads((tmp_path / "new" / MARK).read_text()) == {"format": FORMAT_VERSION}
    assert Workspace.open(tmp_path / "new", create=True).store.read("x") == b"kept"
    assert Workspace.open(str(tmp_path / "new")).store.has("x")


def test_it_opens_in_memory(memory_store: Store) -> None:
    assert Workspace.open(memory_store.root, create=True).store.has(MARK)
    with Workspace.open(memory_store.root).lock():
        pass


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_foreign_folder_is_refused(place: str, tmp_path: Path, memory_store: Store) -> None:
    store = Store(tmp_path) if place == "local" else memory_store
    store.write("thesis/chapter.tex", b"x")
    with pytest.raises(PairmillError, match="other files"):
        Workspace.open(store.root, create=True)
    assert store.files("") == ["thesis/chapter.tex"]


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(PairmillError, match="choose another --workspace"):
        Workspace.open(tmp_path / "file", create=True)


def test_what_a_killed_open_left_is_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}abc").write_bytes(b"{")
    with Workspace.open(tmp_path, create=True).lock():
        assert not (tmp_path / f"{TEMPORARY}abc").exists()


@pytest.mark.parametrize(
    "mark", ['{"format": 1}', '{"format": 3}', '{"format": "1"}', "{}", "[1]", "not json", "", "\xff"]
)
def test_another_version_is_refused(mark: str, tmp_path: Path) -> None:
    (tmp_path / MARK).write_bytes(mark.encode("latin-1"))
    for create in (True, False):
        with pytest.raises(
            PairmillError, match=f"a workspace of format {FORMAT_VERSION}(?s:.*)choose another --workspace"
        ):
            Workspace.open(tmp_path, create=create)
    assert (tmp_path / MARK).read_bytes() == mark.encode("latin-1")


def test_a_second_writer_learns_of_the_first(workspace: Workspace) -> None:
    with another_writer(workspace.store.root) as first:
        with pytest.raises(PairmillError, match=f"process {first.pid} on ") as caught, workspace.lock():
            pass
        assert workspace.store.root in caught.value.expected
    with workspace.lock():
        pass


def test_the_lock_is_free_after_a_kill(workspace: Workspace) -> None:
    with another_writer(workspace.store.root) as first:
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        with workspace.lock():
            assert workspace.store.local
            assert str(os.getpid()) in (workspace.store.local / ".lock").read_text()
            assert str(first.pid) not in (workspace.store.local / ".lock").read_text()


def test_the_lock_is_free_after_an_error_and_held_within_one_process(workspace: Workspace) -> None:
    with pytest.raises(RuntimeError), workspace.lock():
        raise RuntimeError
    with workspace.lock(), pytest.raises(PairmillError, match=str(os.getpid())), workspace.lock():
        pass
    with workspace.lock():
        pass


def test_taking_the_lock_sweeps_what_killed_writers_left(workspace: Workspace) -> None:
    workspace.store.write("pairs/a", b"x")
    assert workspace.store.local
    left = workspace.store.local / "pairs" / f"{TEMPORARY}x"
    left.write_bytes(b"half")
    with workspace.lock():
        assert not left.exists() and workspace.store.has("pairs/a")


def test_a_refused_writer_sweeps_nothing(workspace: Workspace) -> None:
    assert workspace.store.local
    unfinished = workspace.store.local / f"{TEMPORARY}x"
    with another_writer(workspace.store.root):
        unfinished.write_bytes(b"the first writer's")
        with pytest.raises(PairmillError), workspace.lock():
            pass
        assert unfinished.exists()


def test_increments_and_shards_of_a_source(workspace: Workspace) -> None:
    for source, increment in (("web", "0001"), ("web", "0000"), ("web-2", "0000")):
        workspace.store.write_table(f"candidates/{source}/{increment}/part-00000.parquet", CANDIDATES.empty_table())
        ref = ShardRef(f"pairs/{source}-{'a' * 12}/{increment}", 0)
        write_shard(workspace.store, ref, [(pair_row(0), image(0))], PAIRS)
    assert workspace.increments("web") == ["0000", "0001"] and workspace.increments("none") == []
    assert [ref.increment for ref in workspace.pair_shards("web", "a" * 12)] == ["0000", "0001"]
    assert workspace.pair_shards("web", "b" * 12) == []


def test_tombstones(workspace: Workspace) -> None:
    assert workspace.tombstones() == {kind: set() for kind in KINDS}
    workspace.bury("uid", ["u1", "u2", "u1"], "asked")
    workspace.bury("url_key", ["k3"], "opt-out")
    workspace.bury("uid", ["u2"], "asked again")
    assert workspace.tombstones() == {"url_key": {"k3"}, "uid": {"u1", "u2"}, "host": set(), "sha256": set()}
    rows = workspace.store.read_table("tombstones.parquet").to_pylist()
    assert [(r["id"], r["reason"]) for r in rows] == [("u1", "asked"), ("u2", "asked"), ("k3", "opt-out")]
    columns = {"uid": ["u0", "u1", "u3", "u4", "u5"], "url_key": ["k0", "k1", "k3", "k4", None]}
    table = pa.table(columns | {"status": ["ok", "ok", "ok", "forgotten", "ok"]})
    assert workspace.alive(table) == [True, False, False, False, True]
    with pytest.raises(AssertionError):
        workspace.bury("page", ["x"], "no such kind")


def test_a_workspace_without_permission_is_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Workspace.open(tmp_path / "w", create=True)
    monkeypatch.setattr("pairs.workspace.os.access", lambda path, mode: False)
    with pytest.raises(PairmillError, match="permission"):
        Workspace.open(tmp_path / "w", create=True)
    assert Workspace.open(tmp_path / "w").store.local, "reading needs no permission to write"


def test_a_lock_without_permission_is_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace.open(tmp_path / "w", create=True)

    def forbidden(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(PairmillError, match="permission"), space.lock():
        pass
