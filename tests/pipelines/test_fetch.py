"""From candidates to shards: what decoders make of images, what the ledger says, and a fetch that is killed."""

import asyncio
import gzip
import importlib
import io
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from aiohttp import web
from PIL import Image

from pairs.errors import PairmillError
from pairs.identity import make_uid, sha256_hex, url_key
from pairs.process import ROOT
from pairs.recipe import FetchSpec, SourceSpec
from pairs.schemas import CANDIDATES, LEDGER, PAIRS
from pairs.shard import read_shard
from pairs.store import Store
from pairs.verify import verify
from pairs.workspace import Workspace
from pipelines.candidates import cut_increment, part
from pipelines.fetch.decode import Decoded, DecodeSpec, decode, load_resizer
from pipelines.fetch.failures import Failure
from pipelines.fetch.ledger import FetchCounts, fetch_fingerprint
from pipelines.fetch.pool import decoders
from pipelines.fetch.shards import fetch_increment
from tests.pipelines.small_web import ALLOW, SmallWeb, picture, redirect, small_web, with_headers

SPEC = DecodeSpec(side_px=64, format="png", quality=92, max_pixels=4_000_000, min_side_px=8)
SITE = SourceSpec(kind="urls", allow=ALLOW, path="unused.jsonl")


def quiet(done: int, total: int, note: str) -> None:
    pass


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_bomb(side: int = 30_000) -> bytes:
    """A PNG whose header promises side × side pixels, and whose few bytes keep the promise."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8) * 100) for _ in range(side // 100)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def turned() -> bytes:
    """A JPEG, 80×40, left half red, which its EXIF says to turn by 90° clockwise: red comes to the top."""
    image = Image.new("RGB", (80, 40), "blue")
    image.paste((255, 0, 0), (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", quality=95, exif=exif)


def half_clear(mode: str) -> bytes:
    """Left half opaque black, right half wholly transparent."""
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 20))
    if mode == "P":
        flat = Image.new("P", (40, 20), 1)
        flat.putpalette([0, 0, 0, 200, 30, 30])
        flat.paste(0, (0, 0, 20, 20))
        return encoded(flat, transparency=1)
    return encoded(image.convert(mode))


@pytest.fixture(scope="module")
def decode_all() -> Callable[[list[bytes]], list[Decoded | Failure]]:
    """Decodes a list on one pool; the results of all tests come from one start of the processes."""

    def run(images: list[bytes]) -> list[Decoded | Failure]:
        async def go() -> list[Decoded | Failure]:
            async with decoders(SPEC, 1) as decode:
                return [await decode(image) for image in images]

        return asyncio.run(go())

    return run


def pixels(found: Decoded | Failure) -> np.ndarray:
    assert isinstance(found, Decoded), found
    image = Image.open(io.BytesIO(found.image))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_images_become_upright_opaque_rgb(decode_all: Callable[[list[bytes]], list[Decoded | Failure]]) -> None:
    grey16 = Image.fromarray(np.full((20, 20), 0x8000, np.uint16))
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    found = decode_all(
        [
            turned(),
            half_clear("RGBA"),
            half_clear("LA"),
            half_clear("P"),
            encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=95),
            encoded(Image.new("L", (20, 20), 128)),
            encoded(grey16),
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            encoded(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:]),
            picture("green", (640, 320), "JPEG"),
        ]
    )
    upright = pixels(found[0])
    assert upright.shape == (64, 32, 3)
    assert upright[8, 16, 0] > 200 and upright[-8, 16, 2] > 200  # red above, blue below
    assert isinstance(found[0], Decoded)
    assert {k: found[0].facts[k] for k in ("width", "height", "original_width", "original_height")} == {
        **{"width": 32, "height": 64},
        **{"original_width": 40, "original_height": 80},
    }
    for clear in found[1:4]:
        assert pixels(clear)[10, 5].tolist() == [0, 0, 0] and pixels(clear)[10, 35].tolist() == [255, 255, 255]
    assert np.abs(pixels(found[4])[10, 10] - [255, 0, 0]).max() < 30
    assert pixels(found[5])[0, 0].tolist() == [128, 128, 128]
    assert pixels(found[6])[0, 0].tolist() == [128, 128, 128]
    for animation in found[7:9]:
        assert np.abs(pixels(animation)[10, 10] - [255, 0, 0]).max() < 5
    assert pixels(found[9]).shape == (32, 64, 3)


def test_what_is_no_image_has_a_reason(decode_all: Callable[[list[bytes]], list[Decoded | Failure]]) -> None:
    photo = encoded(Image.effect_noise((200, 200), 50).convert("RGB"), "JPEG")
    cases = {
        b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>": "svg",
        b"<?xml version='1.0'?><svg/>": "svg",
        b"<!DOCTYPE html><p>404": "html",
        b"": "not_an_image",
        b"%PDF-1.7": "not_an_image",
        encoded(Image.new("RGB", (20, 20)), "TIFF"): "not_an_image",
        photo[: len(photo) // 2]: "damaged",
        picture(size=(2, 90)): "too_small",
        png_bomb(): "too_many_pixels",
    }
    began = time.monotonic()
    found = decode_all(list(cases))
    assert [f.reason for f in found if isinstance(f, Failure)] == list(cases.values())
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("size", [(640, 480), (999, 1001), (65, 64), (50, 40), (3000, 9), (8, 600)])
def test_resizing_is_that_of_img2dataset(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What we make of an image that needs no normalising is byte for byte what its own Resizer makes of it."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    load_resizer(DecodeSpec(64, "png", 6, 4_000_000, 8))  # leaves albumentations to who imports it next
    theirs = importlib.import_module("img2dataset.resizer").Resizer
    noise = Image.merge("RGB", [Image.effect_noise(size, 80) for _ in range(3)])
    for kind, quality in (("png", 6), ("jpg", 92), ("webp", 92)):
        spec = DecodeSpec(64, kind, 92, 4_000_000, 8)
        resizer = theirs(64, "keep_ratio_largest", True, encode_quality=quality, encode_format=kind)
        for data in (encoded(noise), encoded(noise, "JPEG"), encoded(noise, "JPEG", subsampling=0, progressive=True)):
            image, width, height, _, _, error = resizer(io.BytesIO(data))
            ours = decode(data, spec, load_resizer(spec))
            assert error is None and (ours.image, ours.facts["width"], ours.facts["height"]) == (image, width, height)


def decoder_processes() -> list[psutil.Process]:
    """Not the helpers that other tests' pools have left running."""
    return [child for child in psutil.Process().children() if "pipelines.fetch.decode" in child.cmdline()]


async def test_a_decoder_that_dies_or_outgrows_its_memory_costs_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the middle of an image, those behind it in the pipe being decoded all the same; then a picture whose
    decoding needs more than the limit allows."""
    monkeypatch.setattr("pipelines.fetch.pool.DECODE_S", 30.0)
    async with decoders(DecodeSpec(64, "jpg", 92, max_pixels=10**9, min_side_px=8), 1) as decode:
        await decode(picture())
        (first,) = decoder_processes()
        first.suspend()
        waiting = [asyncio.create_task(decode(picture())) for _ in range(5)]
        await asyncio.sleep(0.1)
        first.kill()
        found = await asyncio.gather(*waiting)
        assert found[0] == Failure("permanent", "decoder_crash") and all(isinstance(f, Decoded) for f in found[1:])
        (second,) = decoder_processes()
        assert second.pid != first.pid
        subprocess.run(["prlimit", f"--as={2 << 30}:{2 << 30}", "--pid", str(second.pid)], check=True)
        assert await decode(png_bomb()) == Failure("permanent", "memory")
        assert isinstance(await decode(picture()), Decoded)


async def test_a_decoding_without_end_costs_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    async with decoders(SPEC, 1) as decode:
        await decode(picture())
        decoder_processes()[0].suspend()
        waiting = [asyncio.create_task(decode(picture())) for _ in range(4)]
        monkeypatch.setattr("pipelines.fetch.pool.DECODE_S", 0.2)
        await asyncio.sleep(0.1)
        monkeypatch.setattr("pipelines.fetch.pool.DECODE_S", 30.0)
        found = await asyncio.gather(*waiting)
    assert found[0] == Failure("permanent", "decode_time") and all(isinstance(f, Decoded) for f in found[1:])


async def test_a_cancelled_decoding_leaves_nothing_to_the_next_image() -> None:
    async with decoders(SPEC, 1) as decode:
        await decode(picture())
        task = asyncio.create_task(decode(encoded(Image.effect_noise((1900, 1900), 80))))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for colour, rgb in (("lime", [0, 255, 0]), ("blue", [0, 0, 255])):
            assert pixels(await decode(picture(colour)))[5, 5].tolist() == rgb


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work", create=True)


def write_candidates(workspace: Workspace, urls: list[str], opt_out: dict[str, str] | None = None) -> None:
    rows = [
        {
            **{"url_key": url_key(url), "url": url, "page": "http://p.test/", "opt_out": (opt_out or {}).get(url)},
            "texts": [{"text": f"text of {url.rpartition('/')[2]}", "kind": "alt", "language": "en"}],
        }
        for url in urls
    ]
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["url_key"])), schema=CANDIDATES)
    workspace.store.write_table(part("src", "0000"), table)


def fetch(workspace: Workspace, spec: FetchSpec) -> FetchCounts:
    return fetch_increment(workspace, "src", SITE, spec, "0000", quiet)


def ledger_of(workspace: Workspace, spec: FetchSpec) -> list[dict[str, Any]]:
    files = workspace.store.files(f"ledger/src-{fetch_fingerprint(spec)}/0000")
    return [row for path in files for row in workspace.store.read_table(path).to_pylist()]


def test_a_pair_of_an_earlier_increment_is_not_made_twice(workspace: Workspace) -> None:
    """With other settings the first increment gives what it failed to give, and the second one has it too."""
    store = workspace.store
    with small_web({"/0.png": picture(), "/1.png": picture("blue")}) as site:
        write_candidates(workspace, [site.url("/1.png"), site.url("/0.png")])
        store.write_table(part("src", "0001"), store.read_table(part("src", "0000")))
        write_candidates(workspace, [site.url("/0.png")])
        assert fetch(workspace, FetchSpec(side_px=16)).ok == 1
        counts = fetch_increment(workspace, "src", SITE, FetchSpec(side_px=16), "0001", quiet)
        assert site.asked.count("/0.png") == 1
    assert counts.ok == 1 and counts.failed == {"refused/earlier": 1} and verify(workspace).problems == []
    group = f"pairs/src-{fetch_fingerprint(FetchSpec(side_px=16))}"
    for end in ("tar", "parquet"):
        store.write(f"{group}/0002/00000.{end}", store.read(f"{group}/0001/00000.{end}"))
    assert (group, "1 uids stand in it more than once") in verify(workspace).problems


async def drip(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    for _ in range(100):
        await answer.write(b"x")
        await asyncio.sleep(0.1)
    return answer


def test_a_hostile_web_gives_one_ledger_row_each_and_clean_shards(workspace: Workspace) -> None:
    good = {f"/good{n}.png": picture("red", (30 + n, 40)) for n in range(5)}
    routes: dict[str, Any] = good | {
        "/robots.txt": with_headers(b"User-agent: *\nDisallow: /private/", {}),
        "/private/a.png": picture(),
        "/to-private": redirect("/private/a.png"),
        "/drip": drip,
        "/bomb": with_headers(gzip.compress(bytes(50_000_000)), {"Content-Encoding": "gzip"}),
        "/png-bomb": png_bomb(),
        "/metadata": redirect("http://169.254.169.254/"),
        "/loop": redirect("/loop"),
        "/noai": with_headers(picture(), {"X-Robots-Tag": "noai"}),
        "/page": "<html><body>no picture",
        "/svg": with_headers(b"<svg/>", {"Content-Type": "image/svg+xml"}),
        "/truncated": encoded(Image.effect_noise((200, 200), 50), "JPEG")[:900],
        "/opted": picture(),
    }
    expected = {
        **dict.fromkeys(good, "ok"),
        **{"/private/a.png": "refused/robots", "/to-private": "refused/robots", "/drip": "transient/deadline"},
        **{"/bomb": "permanent/too_large", "/png-bomb": "permanent/too_many_pixels", "/metadata": "refused/address"},
        **{"/loop": "permanent/too_many_redirects", "/noai": "refused/noai", "/page": "permanent/html"},
        **{"/svg": "permanent/svg", "/truncated": "permanent/damaged", "/opted": "refused/noimageai"},
        **{"/missing": "permanent/http_404"},
    }
    with small_web(routes) as site:
        write_candidates(workspace, [site.url(path) for path in expected], {site.url("/opted"): "noimageai"})
        limits: dict[str, Any] = {"deadline_s": 1.5, "attempts": 1, "max_bytes": 1_000_000}
        spec = FetchSpec(agent="pairmill (+mailto:t@localhost)", shard_pairs=5, side_px=32, **limits)
        counts = fetch(workspace, spec)
        assert "/private/a.png" not in site.asked and "/opted" not in site.asked
        prefix = site.url("")
    rows = ledger_of(workspace, spec)
    found = {
        row["url"].removeprefix(prefix): row["status"] + (f"/{row['reason']}" if row["reason"] else "") for row in rows
    }
    assert found == expected and len(rows) == len(expected)
    assert [row["url_key"] for row in rows] == sorted(row["url_key"] for row in rows)
    assert counts.candidates == len(expected) and counts.ok == 5 and counts.shards == 4
    assert Counter(expected.values()) - Counter({"ok": 5}) == Counter(counts.failed)
    assert counts.refused == 5 and counts.asked == 13 and counts.success == pytest.approx(5 / (18 - 5))
    check_shards(workspace, spec, rows, {url_key(site.url(path)): data for path, data in good.items()})


def check_shards(workspace: Workspace, spec: FetchSpec, ledger: list[dict[str, Any]], good: dict[str, bytes]) -> None:
    shards = [read_shard(workspace.store, ref) for ref in workspace.pair_shards("src", fetch_fingerprint(spec))]
    assert [shard.ref.index for shard in shards] == [0, 1, 2, 3]  # also those without a pair
    pairs = [row for shard in shards for row in shard.table.to_pylist()]
    assert all(shard.table.schema.equals(PAIRS, check_metadata=False) for shard in shards)
    assert [row["url_key"] for row in pairs] == sorted(good)
    assert {row["uid"] for row in pairs} == {row["uid"] for row in ledger if row["status"] == "ok"}
    for row in pairs:
        data = good[row["url_key"]]
        assert row["sha256"] == sha256_hex(data) and row["uid"] == make_uid(row["url_key"], row["sha256"])
        assert row["original_bytes"] == len(data) and row["text"].startswith("text of good") and row["height"] == 32
    images = [image for shard in shards for image in shard.images()]
    assert all(Image.open(io.BytesIO(image or b"")).format == "JPEG" for image in images) and len(images) == 5


def test_resume_makes_only_what_is_missing_with_equal_bytes(workspace: Workspace) -> None:
    routes = {f"/{n}.png": picture("red", (30 + n, 40)) for n in range(12)}
    spec = FetchSpec(shard_pairs=4, side_px=32)
    with small_web(routes) as site:
        write_candidates(workspace, [site.url(path) for path in routes])
        assert fetch(workspace, spec).shards == 3
        files = workspace.store.files("pairs")
        before = {path: workspace.store.read(path) for path in files}
        again = fetch(workspace, spec)
        assert (again.shards, again.reused, again.requests, again.ok) == (0, 3, 0, 12)
        workspace.store.delete(files[2])  # the table of the second shard: a kill between tar and table
        site.asked.clear()
        assert fetch(workspace, spec).shards == 1
        assert len(site.asked) == 4  # the shard's, and no robots.txt, which is kept
    assert {path: workspace.store.read(path) for path in workspace.store.files("pairs")} == before
    smaller = FetchSpec(shard_pairs=12, side_px=16)
    with small_web(routes) as _:
        fetch(workspace, smaller)
    assert len(ledger_of(workspace, smaller)) == len(ledger_of(workspace, spec)) == 12
    back = fetch(workspace, spec)
    assert (back.shards, back.candidates, back.ok) == (0, 12, 12)


def test_tombstones_hold_before_and_after_the_bytes_are_there(workspace: Workspace) -> None:
    routes = {"/0.png": picture("red"), "/1.png": picture("blue")}
    with small_web(routes) as site:
        urls = [site.url(path) for path in routes]
        write_candidates(workspace, urls)
        workspace.bury("url_key", [url_key(urls[0])], "asked for")
        workspace.bury("uid", [make_uid(url_key(urls[1]), sha256_hex(routes["/1.png"]))], "asked for")
        counts = fetch(workspace, FetchSpec(side_px=32))
        assert "/0.png" not in site.asked
    assert counts.ok == 0 and counts.failed == {"refused/forgotten": 2}
    assert counts.success == 1.0 and counts.asked == 0, "nothing was asked for, which a gate can tell from success"


def test_a_slow_host_holds_back_its_own_rows_only(workspace: Workspace) -> None:
    """The slow host's images stand in every shard; the other host's are all there long before the first of them."""
    when: dict[str, float] = {}

    def at(name: str, pause_s: float) -> Callable[[web.Request], Any]:
        async def answer(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(pause_s)
            when[name] = time.monotonic()
            return web.Response(body=picture())

        return answer

    slow = {f"/{n}.png": at(f"slow {n}", 1.0) for n in range(4)}
    quick = {f"/{n}.png": at(f"quick {n}", 0.0) for n in range(40)}
    with small_web(dict(slow), "127.0.0.2") as one, small_web(dict(quick), "127.0.0.3") as other:
        write_candidates(workspace, [one.url(path) for path in slow] + [other.url(path) for path in quick])
        assert fetch(workspace, FetchSpec(shard_pairs=5, side_px=16, per_host=1)).ok == 44
    last_quick = max(moment for name, moment in when.items() if name.startswith("quick"))
    assert last_quick < sorted(moment for name, moment in when.items() if name.startswith("slow"))[2]


def test_unreachable_is_a_share_not_an_error(workspace: Workspace) -> None:
    with small_web({}) as site:
        urls = [site.url(f"/{n}.png") for n in range(3)]
    write_candidates(workspace, urls)
    counts = fetch(workspace, FetchSpec(attempts=1))
    assert counts.success == 0.0 and sum(counts.failed.values()) == 3
    assert all(name.startswith("transient/") for name in counts.failed)
    assert pa.Table.from_pylist(ledger_of(workspace, FetchSpec()), schema=LEDGER).num_rows == 3


def test_a_full_disk_is_one_clear_message(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.fetch.shards.tempfile.TemporaryFile", full)
    write_candidates(workspace, ["http://127.0.0.1:1/a.png"])
    with pytest.raises(PairmillError, match="no space left"):
        fetch(workspace, FetchSpec(attempts=1))
    assert workspace.store.files("pairs") == []


@pytest.mark.timeout(20)
def test_a_shard_that_fails_ends_a_fetch_that_waits_for_room(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More candidates than may be under way, and every one of the first shard fails by a bug."""

    async def broken(*args: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("pipelines.fetch.shards.fetch_one", broken)
    monkeypatch.setattr("pipelines.fetch.shards.AHEAD", 4)
    write_candidates(workspace, [f"http://127.0.0.1:1/{n}.png" for n in range(12)])
    with pytest.raises(AssertionError, match="a bug"):
        fetch(workspace, FetchSpec(shard_pairs=4))


def test_a_folder_takes_the_same_path_without_a_request(workspace: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for n in range(3):
        (root / f"{n}.png").write_bytes(picture("red", (50 + n, 40)))
        (root / f"{n}.txt").write_text(f"number {n}")
    source = SourceSpec.model_validate({"kind": "folder", "path": str(root)})
    spec = FetchSpec(side_px=32, max_bytes=100_000)
    cut_increment(workspace, "src", source, spec, quiet)
    (root / "2.png").unlink()
    (root / "2.png").symlink_to("/etc/passwd")  # exchanged after the cut
    counts = fetch_increment(workspace, "src", source, spec, "0000", quiet)
    assert counts.ok == 2 and counts.failed == {"refused/outside_the_folder": 1} and counts.requests == 0


def test_the_fingerprint_follows_what_enters_the_bytes() -> None:
    base = fetch_fingerprint(FetchSpec())
    assert fetch_fingerprint(FetchSpec(agent="other (+x)", per_host=9, deadline_s=1, attempts=1)) == base
    assert len({base, fetch_fingerprint(FetchSpec(side_px=128)), fetch_fingerprint(FetchSpec(shard_pairs=5))}) == 3


KILLED = """
import sys
from pairs.workspace import Workspace
from tests.pipelines.test_fetch import KILL_SPEC, fetch
fetch(Workspace.open(sys.argv[1]), KILL_SPEC)
"""
KILL_SPEC = FetchSpec(shard_pairs=10, side_px=32, per_host=2)


def start_killed(workspace: Workspace, site: SmallWeb, shards: int) -> None:
    """A fetch in a process of its own, ended by SIGKILL once it has published so many shards."""
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(workspace.store.root)], cwd=ROOT)
    until = time.monotonic() + 50
    while len(workspace.store.files("pairs", ".parquet")) < shards:
        assert time.monotonic() < until and child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()


@pytest.mark.slow
def test_a_killed_fetch_loses_and_repeats_nothing(workspace: Workspace, tmp_path: Path) -> None:
    routes = {f"/{n}.png": picture("red", (30 + n, 40)) for n in range(95)}
    with small_web(routes) as site:
        urls = [site.url(path) for path in routes]
        whole = Workspace.open(tmp_path / "whole", create=True)
        for one in (whole, workspace):
            write_candidates(one, urls)
        fetch(whole, KILL_SPEC)
        for shards in (1, 4):
            start_killed(workspace, site, shards)
        tables = [workspace.store.read_table(path) for path in workspace.store.files("pairs", ".parquet")]
        published = {url for table in tables for url in table["url"].to_pylist()}
        assert 40 <= len(published) < 95
        site.asked.clear()
        with workspace.lock():
            assert fetch(workspace, KILL_SPEC).ok == 95
        asked = {site.url(path) for path in site.asked}
    assert not asked & published
    assert contents(workspace.store) == contents(whole.store)


def contents(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in store.files("pairs")}
