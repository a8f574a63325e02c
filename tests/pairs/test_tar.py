"""Tars of reproducible bytes, and a reader that believes nothing."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairs.errors import PairmillError
from pairs.tar import BLOCK, Member, TarWriter, _header, read_members

KEYS = st.from_regex(r"\A[0-9A-Za-z_-]{1,80}\Z")
EXTENSIONS = st.sampled_from(["jpg", "png", "webp", "txt", "json", "seg.png", "x" * 16])
DATA = st.binary(max_size=2000) | st.sampled_from([b"", b"x" * 511, b"x" * 512, b"x" * 513, bytes(1024)])
PAIRS = st.dictionaries(KEYS, st.dictionaries(EXTENSIONS, DATA, min_size=1, max_size=3), max_size=6)
Content = dict[str, dict[str, bytes]]
SMALL: Content = {
    f"{i:032x}": {"jpg": bytes([i]) * (500 + 40 * i), "txt": f"a dog, {i} ducks, ½".encode(), "json": b'{"i": %d}' % i}
    for i in range(3)
}


def write(content: Content) -> tuple[bytes, list[Member]]:
    out = io.BytesIO()
    writer = TarWriter(out)
    members = [writer.add(key, ext, data) for key, parts in content.items() for ext, data in parts.items()]
    writer.close()
    assert writer.size == len(out.getvalue())
    return out.getvalue(), members


@given(PAIRS)
def test_round_trip(content: Content) -> None:
    data, members = write(content)
    assert read_members(data, "t") == members
    back: Content = {}
    for m in members:
        back.setdefault(m.key, {})[m.ext] = data[m.offset : m.offset + m.size]
    assert back == content
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # the standard library sees the same
        for info, member in zip(tar.getmembers(), members, strict=True):
            assert (info.name, info.offset_data) == (f"{member.key}.{member.ext}", member.offset)
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w", format=tarfile.USTAR_FORMAT) as tar:  # and writes it
        for member in members:
            info = tarfile.TarInfo(f"{member.key}.{member.ext}")
            info.size = member.size
            tar.addfile(info, io.BytesIO(content[member.key][member.ext]))
    assert out.getvalue() == data


@pytest.mark.parametrize("size", [0, 7, 8**5, 8**11 - 1])
def test_a_header_is_that_of_the_standard_library(size: int) -> None:
    info = tarfile.TarInfo("k" * 80 + "." + "x" * 16)
    info.size = size
    assert _header(info.name.encode(), size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_the_same_members_give_the_same_bytes() -> None:
    one, other = write(SMALL)[0], write(SMALL)[0]
    assert one == other and len(one) % BLOCK == 0
    with tarfile.open(fileobj=io.BytesIO(one)) as tar:
        facts = {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode, i.type) for i in tar}
    assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}
    assert b"ustar\x0000" in one[:BLOCK]  # POSIX, with no GNU or pax extensions


def test_a_golden_tar() -> None:
    out = io.BytesIO()
    writer = TarWriter(out)
    writer.add("0" * 32, "txt", b"a dog")
    writer.close()
    assert (writer.size, writer.sha256) == (10240, "f20c54cad2c0ca50c1e94bd52622d42cffda3d88d2f22742cedebb2d63d22adc")


def test_an_empty_tar_is_whole() -> None:
    assert read_members(write({})[0], "t") == []


def test_a_cut_at_every_block_is_seen() -> None:
    data, members = write(SMALL)
    end = members[-1].offset + BLOCK  # its data is shorter than a block
    assert data[end:].strip(b"\0") == b"" and data[end - BLOCK : end].strip(b"\0")
    for cut in range(0, end + 2 * BLOCK, BLOCK):
        with pytest.raises(PairmillError, match=r"name\.tar"):
            read_members(data[:cut], "name.tar")
    assert read_members(data[: end + 2 * BLOCK], "t") == members  # padding behind the end mark holds nothing


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.data())
def test_a_cut_anywhere_is_seen(cut: int, draw: st.DataObject) -> None:
    data, members = write(SMALL)
    end = members[-1].offset + BLOCK
    with pytest.raises(PairmillError):
        read_members(data[: cut % (end + 2 * BLOCK)], "t")


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 7000), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_damage_is_an_error_for_the_user_or_harmless(changes: list[tuple[int, int]], checksums: bool) -> None:
    """Nothing but a PairmillError comes out, and no member reaches beyond the data."""
    data = bytearray(write(SMALL)[0])
    for place, value in changes:
        data[place] = value
    for start in range(0, len(data), BLOCK) if checksums else ():
        head = data[start : start + BLOCK]
        if head[257:262] == b"ustar":
            head[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(head)
    try:
        members = read_members(bytes(data), "t")
    except PairmillError:
        return
    assert all(m.offset >= 0 and m.size >= 0 and m.offset + m.size <= len(data) for m in members)


def foreign(*infos: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, data in infos:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def plain(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


def special(kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo("abc.jpg")
    info.type, info.linkname = kind, target
    return info, b""


KINDS = {
    "symbolic link": special(tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special(tarfile.LNKTYPE, "other.jpg"),
    "character device": special(tarfile.CHRTYPE),
    "block device": special(tarfile.BLKTYPE),
    "pipe": special(tarfile.FIFOTYPE),
    "folder": special(tarfile.DIRTYPE),
    "contiguous": special(tarfile.CONTTYPE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_refused(kind: str) -> None:
    with pytest.raises(PairmillError, match="a link, a folder, a device"):
        read_members(foreign(plain("aaa.jpg"), KINDS[kind]), "t")


def test_a_sparse_file_is_refused() -> None:
    """Its data isn't where its offset says."""
    info = tarfile.TarInfo("abc.jpg")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": "9",
    }
    with pytest.raises(PairmillError, match="sparse"):
        read_members(foreign((info, b"x"), format=tarfile.PAX_FORMAT), "t")


NAMES = ["../abc.jpg", "/abc.jpg", "a/b.jpg", "./abc.jpg", "abc", ".jpg", "abc.", "abc..jpg", "a b.jpg", "ä.jpg"]
NAMES += ["abc.x/../../y", "k" * 81 + ".jpg", "abc." + "x" * 17, "abc.jp g"]


@pytest.mark.parametrize("name", NAMES)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(PairmillError, match="a member named"):
        read_members(foreign(plain(name), format=tarfile.GNU_FORMAT), "t")


@pytest.mark.parametrize("name", ["k" * 120 + ".jpg", "a/" * 60 + "b.jpg"])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_other_writers_are_refused(name: str, format: int) -> None:
    with pytest.raises(PairmillError, match="a member named"):
        read_members(foreign(plain(name), format=format), "t")


def test_tars_of_other_writers_are_read() -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info, data = plain("abc.jpg", b"data")
        info.mtime = 1.5  # pax writes a header of its own for this, as webdataset's writer does
        found = foreign((info, data), plain("abc.txt"), format=format)
        assert [(m.key, m.ext, found[m.offset : m.offset + m.size]) for m in read_members(found, "t")] == [
            ("abc", "jpg", b"data"),
            ("abc", "txt", b"x"),
        ]


def test_interleaved_and_repeated_members_are_refused() -> None:
    with pytest.raises(PairmillError, match="aa that are not adjacent"):
        read_members(foreign(plain("aa.jpg"), plain("bb.jpg"), plain("aa.txt")), "t")
    with pytest.raises(PairmillError, match=r"aa\.jpg twice"):
        read_members(foreign(plain("aa.jpg"), plain("aa.jpg")), "t")


def test_data_behind_the_end_mark_is_refused() -> None:
    """Other readers would stop there, and lose the second half without a word."""
    one, other = write({"aa": {"jpg": b"1"}})[0], write({"bb": {"jpg": b"2"}})[0]
    with pytest.raises(PairmillError, match="behind the end mark"):
        read_members(one + other, "t")


def test_sizes_that_cannot_be_are_refused() -> None:
    for size in (-1024, 2**63, 2**80):
        info = tarfile.TarInfo("abc.jpg")
        info.size = size
        with pytest.raises(PairmillError):
            read_members(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240), "t")


BAD_ADDS: list[Callable[[TarWriter], object]] = [
    *(lambda w, k=key: w.add(k, "jpg", b"") for key in ("", "a.b", "a/b", "../a", "k" * 81, "ä", "a\n", "a b")),
    *(lambda w, e=ext: w.add("a", e, b"") for ext in ("", "/x", "../x", ".jpg", "x" * 17, "jpg\n", "ä")),
    lambda w: [w.add("aa", "jpg", b""), w.add("aa", "jpg", b"")],
    lambda w: [w.add("aa", "jpg", b""), w.add("bb", "jpg", b""), w.add("aa", "txt", b"")],
]


@pytest.mark.parametrize("add", BAD_ADDS)
def test_the_writer_writes_nothing_that_the_reader_refuses(add: Callable[[TarWriter], object]) -> None:
    with pytest.raises(PairmillError):
        add(TarWriter(io.BytesIO()))


def test_the_standard_library_extracts_it(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(write(SMALL)[0])
    with tarfile.open(tmp_path / "t.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    found: Content = {}
    for path in sorted((tmp_path / "out").iterdir()):
        found.setdefault(path.stem, {})[path.suffix[1:]] = path.read_bytes()
    assert found == SMALL


def test_a_header_that_says_it_is_large_is_not_read() -> None:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"comment": "x" * 2_000_000}
        tar.addfile(info)
    with pytest.raises(PairmillError, match="a header of"):
        read_members(out, "t")
