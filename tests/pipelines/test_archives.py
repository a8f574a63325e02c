"""Archives: the record that a crawl gives, what is damaged counted, finished files never read again."""

import gzip
import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from pairs.errors import PairmillError
from pairs.recipe import FetchSpec, SourceSpec
from pairs.workspace import Workspace
from pipelines.candidates import CutCounts, cut_increment, part
from pipelines.sources import archive_files
from pipelines.sources.archive_files import Limits
from pipelines.sources.archive_records import Answer, Record, body, http_answer, records
from pipelines.sources.warc import read_pages
from pipelines.sources.wat import read_notes
from tests.pipelines.small_web import ALLOW, small_web, with_headers

HTML = ("Content-Type", "text/html")
LIMITS = Limits("pairmill/1 (+x)", 5_000)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work", create=True)


def answer(url: str, content: bytes, *headers: tuple[str, str], status: str = "200 OK") -> tuple[Any, ...]:
    return url, content, StatusAndHeaders(status, list(headers), protocol="HTTP/1.1")


def archive(*answers: tuple[Any, ...], zipped: bool = True) -> bytes:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=zipped)
    writer.write_record(writer.create_warcinfo_record("x", {"software": "tests"}))
    for url, content, headers in answers:
        record = writer.create_warc_record(url, "response", payload=io.BytesIO(content), http_headers=headers)
        writer.write_record(record)
    return out.getvalue()


def pages(count: int, start: int = 0) -> list[tuple[Any, ...]]:
    urls = [f"http://a.test/{n}.html" for n in range(start, start + count)]
    return [answer(url, f'<img src="{n}.png" alt="n {n}">{url * 9}'.encode(), HTML) for n, url in enumerate(urls)]


def fates(data: bytes) -> dict[str, int]:
    return dict(Counter(fate for fate, _, _ in read_pages(io.BytesIO(data), LIMITS)))


def cut(workspace: Workspace, path: Path | list[str], **more: Any) -> CutCounts:
    paths = [str(p) for p in path] if isinstance(path, list) else str(path)
    spec = SourceSpec.model_validate({"kind": "warc", "path": paths, **more.pop("settings", {})})
    return cut_increment(workspace, "src", spec, FetchSpec(), lambda *a: None, **more)


@pytest.mark.parametrize("zipped", [True, False])
def test_only_pages_that_answered_count_as_such(zipped: bool) -> None:
    image = b'<img src="a.png" alt="apple">'
    data = archive(
        answer("http://a.test/ok", image, HTML),
        answer("http://a.test/xhtml", image, ("Content-Type", "application/xhtml+xml; charset=utf-8")),
        answer("http://a.test/none", image),
        answer("http://a.test/moved", b"", HTML, status="301 Moved"),
        answer("http://a.test/a.png", b"PNG", ("Content-Type", "image/png")),
        answer("http://a.test/large", image + b" " * 5_000, HTML),
        answer("http://a.test/huge", image + b" " * 200_000, HTML),
        answer("http://a.test/bomb", gzip.compress(b"\0" * 9_000_000), HTML, ("Content-Encoding", "gzip")),
        answer("http://a.test/odd", b"\x8b\x02\x80", HTML, ("Content-Encoding", "br")),
        zipped=zipped,
    )
    assert fates(data) == {"ok": 3, "http_301": 1, "not_a_page": 1, "too_large": 3, "encoding": 1}


def test_bodies_as_a_browser_would_have_them() -> None:
    plain = b"<p>" + b"word " * 400
    bare = zlib.compressobj(wbits=-15)
    chunks = b"3;x=y\r\n<p>\r\n7d0\r\n" + plain[3:] + b"\r\n0\r\n\r\n"
    forms: list[tuple[bytes, list[tuple[str, str]]]] = [
        (gzip.compress(plain), [("Content-Encoding", "gzip")]),
        (zlib.compress(plain), [("content-encoding", "deflate")]),
        (bare.compress(plain) + bare.flush(), [("Content-Encoding", "deflate")]),
        (chunks, [("Transfer-Encoding", "chunked")]),
        (plain, [("Content-Encoding", "gzip"), ("Transfer-Encoding", "chunked")]),  # stored decoded, headers left
    ]
    data = archive(*(answer(f"http://a.test/{n}", sent, *headers) for n, (sent, headers) in enumerate(forms)))
    found = [r for r in records(io.BytesIO(data), 5_000) if isinstance(r, Record) and "warc-target-uri" in r.headers]
    answers = [http_answer(record.block) for record in found]
    assert [body(a, 5_000) for a in answers if a] == [plain] * len(forms)


def members(data: bytes) -> list[int]:
    """Where the gzip members begin."""
    starts, at = [], 0
    while at < len(data):
        inflate = zlib.decompressobj(31)
        inflate.decompress(data[at:])
        starts.append(at)
        at = len(data) - len(inflate.unused_data)
    return starts


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("number", [0, 1, 3, 5])
def test_a_damaged_record_costs_itself_alone(number: int, place: float) -> None:
    data = bytearray(archive(*pages(5)))
    starts = [*members(bytes(data)), len(data)]
    at = int(starts[number] + place * (starts[number + 1] - starts[number] - 8))
    for spot in range(at, at + 8):
        data[spot] ^= 0x5A
    found = fates(bytes(data))
    assert found.get("broken_record", 0) + found.get("truncated", 0) == 1
    assert found["ok"] == 5 - (number > 0)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_archive_cut_anywhere_says_so_or_ends_between_records(zipped: bool) -> None:
    data = archive(*pages(4), zipped=zipped)
    whole = Counter(records_of(data))
    for size in range(1, len(data), 37):
        found = records_of(data[:size])
        lost = [item for item in found if isinstance(item, str) and item in ("truncated", "broken_record")]
        assert len(found) - len(lost) <= whole.total()
        assert len(lost) == 1 or found == records_of(data)[: len(found)]
        assert lost or size in ends(data, zipped), size


def records_of(data: bytes) -> list[str]:
    return [r if isinstance(r, str) else r.headers["warc-record-id"] for r in records(io.BytesIO(data), 5_000)]


def ends(data: bytes, zipped: bool) -> set[int]:
    """Sizes at which a cut leaves whole records: the blank lines behind a plain one may be missing."""
    if zipped:
        return set(members(data))
    starts = [at for at in range(len(data)) if data.startswith(b"WARC/1.", at)] + [len(data)]
    return {start - back for start in starts for back in range(5)} | set(range(5))


def test_a_header_that_is_none_is_passed_over() -> None:
    data = archive(*pages(4), zipped=False)
    second = data.find(b"WARC/1.", data.find(b"/1.html") - 400)
    broken = data[:second] + b"GARC/9." + data[second + 7 :]
    assert fates(broken) == {"ok": 3, "broken_record": 1}
    assert fates(b"no archive at all " * 9_000) == {"broken_record": 1} and fates(b"") == {}


@pytest.mark.parametrize("length", ["²", "9" * 5_000, "+5", "-1"])
def test_a_length_that_is_none_costs_its_record(length: str) -> None:
    data = archive(*pages(2), zipped=False)
    at = data.find(b"Content-Length: ", data.find(b"/0.html")) + 16
    broken = data[:at] + length.encode() + data[data.find(b"\r\n", at) :]
    assert fates(broken) == {"ok": 1, "broken_record": 1}


@pytest.mark.parametrize("length", [b"-6", b"+3", b"0x3", b"f" * 60, b"1_0"])
def test_a_chunk_of_no_length_ends_the_body(length: bytes) -> None:
    sent = Answer(200, [("Transfer-Encoding", "chunked")], b"3\r\n<p>\r\n" + length + b"\r\nxyz\r\n")
    assert body(sent, 5_000) == b"<p>"


def test_a_page_that_breaks_the_reader_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(url: str, *_: Any) -> dict[str, Any]:
        raise OSError("gone") if url.endswith("9.html") else LookupError("a bug")

    monkeypatch.setattr("pipelines.sources.warc.read_page", broken)
    assert fates(archive(*pages(3))) == {"broken_page": 3}
    with pytest.raises(OSError, match="gone"):
        fates(archive(*pages(1, start=9)))


PAGE = """<html lang=en><title>t</title><base href="/m/"><meta property="og:image" content="o.png">
<meta property="og:title" content="words"><link rel=license href="/cc0"><img data-src=a.png alt="Äpfel">
<figure><picture><source srcset="b.png 100w, c.png 900w"><img src=d.png alt=d></picture><figcaption>cap</figcaption>
</figure>"""


@pytest.mark.parametrize("headers", [{}, {"X-Robots-Tag": "noai"}, {"TDM-Reservation": "1"}])
def test_a_page_gives_one_record_crawled_or_archived(
    headers: dict[str, str], workspace: Workspace, tmp_path: Path
) -> None:
    kind = {"Content-Type": "text/html; charset=latin-1"} | headers
    routes: Any = {"/": with_headers(PAGE.encode("latin-1"), kind), "/robots.txt": with_headers(b"", {}, 404)}
    with small_web(routes) as site:
        spec = SourceSpec.model_validate({"kind": "site", "seeds": [site.url("/")], "allow": ALLOW, "delay_s": 0})
        cut_increment(workspace, "site", spec, FetchSpec(deadline_s=5, attempts=1), lambda *a: None)
        (tmp_path / "a.warc.gz").write_bytes(archive(answer(site.url("/"), PAGE.encode("latin-1"), *kind.items())))
    assert cut(workspace, tmp_path / "a.warc.gz").pages == {"ok": 1}
    crawled, archived = (workspace.store.read_table(part(name, "0000")).to_pylist() for name in ("site", "src"))
    assert archived == crawled and len(crawled) == 3
    assert {row["opt_out"] for row in crawled} == {{"X-Robots-Tag": "noai", "TDM-Reservation": "tdm"}.get(
        next(iter(headers), "")
    )}  # fmt: skip


def test_finished_files_are_not_read_again(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        (tmp_path / f"{n}.warc.gz").write_bytes(archive(*pages(3, 3 * n)))
    other = Workspace.open(tmp_path / "other", create=True)
    cut(other, tmp_path / "*.warc.gz")
    assert not other.store.files("crawl")
    read, whole = [], archive_files._read_file

    def dies(*args: Any) -> None:
        read.append(args[-1][0])
        if len(read) == 3:
            raise KeyboardInterrupt
        whole(*args)

    monkeypatch.setattr(archive_files, "_read_file", dies)
    with pytest.raises(KeyboardInterrupt):
        cut(workspace, tmp_path / "*.warc.gz")
    assert cut(workspace, [tmp_path / f"{n}.warc.gz" for n in range(3)]).pages == {"ok": 9}
    assert len(read) == 4 and read[3] == read[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_ray_as_inline(workspace: Workspace, tmp_path: Path) -> None:
    for n in range(2):
        (tmp_path / f"{n}.warc.gz").write_bytes(archive(*pages(3, 3 * n)) + b"rest")
    other = Workspace.open(tmp_path / "other", create=True)
    assert cut(workspace, tmp_path / "*.gz", engine="ray", workers=2) == cut(other, tmp_path / "*.gz")
    assert workspace.store.read(part("src", "0000")) == other.store.read(part("src", "0000"))


def test_no_archive_is_advice(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="no file at"):
        cut(workspace, tmp_path / "*.warc")


def note(url: str, status: str = "200", kind: str = "text/html", **html: Any) -> bytes:
    response = {
        "Headers": {"Content-Type": kind, "X-Robots-Tag": html.pop("tag", "all")},
        "Response-Message": {"Status": status},
        "HTML-Metadata": html,
    }
    payload = {"HTTP-Response-Metadata": response}
    head = {"WARC-Target-URI": url}
    return json.dumps({"Envelope": {"Payload-Metadata": payload, "WARC-Header-Metadata": head}}).encode()


def test_wat(workspace: Workspace, tmp_path: Path) -> None:
    links = [
        {"path": "IMG@/src", "url": "a.png", "alt": "apple", "title": "tip"},
        {"path": "A@/href", "url": "b.html"},
        {"path": "IMG@/src", "url": "data:image/png;base64,AA"},
    ]
    notes = [
        note("http://a.test/x/", Links=links, Head={"Title": " T ", "Base": "/m/"}),
        note("http://b.test/", Links=links[:1], Head={"Metas": [{"name": "robots", "content": "noai"}]}),
        note("http://c.test/", Links=links[:1], tag="noimageai"),
        note("http://d.test/", Links=links[:1], Head={"Metas": [{"name": "tdm-reservation", "content": "1"}]}),
        note("http://g.test/", Links=links[:1], tag=["all", "noai, noindex"]),
        note("http://e.test/", status="404"),
        note("http://f.test/", kind="image/png"),
        b'{"Envelope": {"Payload-Metadata": {}}}',
        b'{"Envelope": [',
        b"[" * 4_000,
    ]
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    for data in notes:
        writer.write_record(writer.create_warc_record("http://a.test/", "metadata", payload=io.BytesIO(data)))
    (tmp_path / "a.wat.gz").write_bytes(out.getvalue())
    spec = SourceSpec(kind="wat", path=str(tmp_path / "a.wat.gz"))  # type: ignore[call-arg]
    counts = cut_increment(workspace, "src", spec, FetchSpec(), lambda *a: None)
    assert counts.pages == {"ok": 5, "http_404": 1, "not_a_page": 1, "broken_record": 2}
    assert (counts.found, counts.dropped) == (6, {"data_url": 1})
    rows = {row["url"]: row for row in workspace.store.read_table(part("src", "0000")).to_pylist()}
    apple = rows["http://a.test/m/a.png"]
    assert [(t["text"], t["kind"]) for t in apple["texts"]] == [("apple", "alt"), ("tip", "img_title"), ("T", "title")]
    assert apple["page"] == "http://a.test/x/" and apple["opt_out"] is None
    opted = {url: row["opt_out"] for url, row in rows.items() if row["opt_out"]}
    assert opted == {
        "http://b.test/a.png": "noai",
        "http://c.test/a.png": "noimageai",
        "http://d.test/a.png": "tdm",
        "http://g.test/a.png": "noai",
    }


def test_a_note_gives_open_graph_and_the_licence_as_its_page_does() -> None:
    metas = [{"property": "og:image", "content": " o.png"}, {"name": "og:title", "content": "words"}]
    metas += [{"property": "og:description", "content": "more"}, {"property": "og:image:alt", "content": "alt"}]
    head = {
        **{"Title": "t", "Base": "/m/", "Metas": metas},
        "Link": [{"path": "LINK@/href", "rel": "icon", "url": "i.png"}, {"rel": "License", "url": "/cc0"}],
    }
    data = note("http://a.test/x/", Head=head, Links=[{"path": "IMG@/src", "url": "a.png", "alt": "apple"}])
    page = """<title>t</title><base href="/m/"><meta property="og:image" content=" o.png"><meta name="og:title"
    content="words"><meta property="og:description" content="more"><meta property="og:image:alt" content="alt">
    <link rel=icon href=i.png><link rel=License href="/cc0"><img src="a.png" alt="apple">"""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    writer.write_record(writer.create_warc_record("http://a.test/x/", "metadata", payload=io.BytesIO(data)))
    noted = list(read_notes(io.BytesIO(out.getvalue()), LIMITS))
    assert noted == list(
        read_pages(io.BytesIO(archive(answer("http://a.test/x/", page.encode(), HTML), zipped=False)), LIMITS)
    )
    [(_, rows, _)] = noted
    assert [row["url"] for row in rows] == ["http://a.test/m/a.png", "http://a.test/m/o.png"]
    assert {row["license"] for row in rows} == {"http://a.test/cc0"}
