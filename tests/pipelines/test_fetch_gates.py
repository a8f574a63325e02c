"""What ends a fetch early, what comes again and when, and what must never be kept."""

import asyncio
import io
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from filters.image_hash import hashes
from pairs.errors import PairmillError
from pairs.identity import sha256_hex, url_key
from pairs.recipe import BlockSpec, FetchSpec, SourceSpec
from pairs.schemas import LEDGER
from pairs.workspace import Workspace
from pipelines.candidates import cut_increment, part
from pipelines.fetch import gates, shards
from pipelines.fetch.blocklists import load_blocklists
from pipelines.fetch.decode import DecodeSpec, decode, load_resizer
from pipelines.fetch.failures import RETRY_AFTER_MAX_S, Failure
from pipelines.fetch.gates import FIRST, SuccessGate, preflight
from pipelines.fetch.ledger import Passing, Settled, due, fetch_fingerprint, passing_failures, settled
from pipelines.fetch.policies import RESTS, load_rests, save_rests
from pipelines.fetch.shards import fetch_increment
from tests.pipelines.hostile import NEVER
from tests.pipelines.small_web import ALLOW, picture, redirect, small_web, with_headers
from tests.pipelines.test_fetch import SITE, encoded, ledger_of, quiet, write_candidates


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work", create=True)


def feed(gate: SuccessGate, outcomes: list[str], host: str = "a.test") -> None:
    for outcome in outcomes:
        gate.judge(outcome, host)


def test_the_first_batch_must_pass_the_floor() -> None:
    bad = ["transient/http_503"] * 3 + ["ok"]
    with pytest.raises(PairmillError, match=r"150 × transient/http_503") as error:
        feed(SuccessGate("web", 0.5), bad * (FIRST // 4))
    assert "25.0%" in error.value.found and "servers fail" in error.value.remedy
    feed(SuccessGate("web", 0.5), (bad * FIRST)[: FIRST - 1])
    feed(SuccessGate("web", 0.2), bad * FIRST)
    feed(SuccessGate("web", 0.0), bad * FIRST)
    feed(SuccessGate("web", 0.5, Counter(ok=1000)), bad * (FIRST // 4))  # one bad increment among good ones
    gate = SuccessGate("web", 0.5)
    feed(gate, ["refused/robots"] * FIRST * 2 + ["ok"] + ["transient/dns"] * (FIRST - 2))
    with pytest.raises(PairmillError, match=rf"of the last {FIRST}: {FIRST - 1} × transient/dns"):
        feed(gate, ["transient/dns"])


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_success_that_collapses_stops_and_dead_hosts_do_not_count(floor: float) -> None:
    gate = SuccessGate("web", floor)
    feed(gate, ["ok"] * FIRST * 2)
    feed(gate, ["transient/deadline"] * FIRST * 2, "never.test")
    with pytest.raises(PairmillError, match=r"transient/connect") as error:
        feed(gate, ["transient/connect"] * FIRST)
    assert "firewall" in error.value.remedy and gate.now["transient/connect"] > FIRST * 0.8
    assert "min_fetch_success" not in str(error.value)
    gate = SuccessGate("web", floor)
    feed(gate, ["ok"] * FIRST * 2 + (["transient/http_503"] * 3 + ["ok"]) * FIRST)  # worse, and no collapse


def test_a_fetch_without_a_floor_stops_where_its_source_collapses(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "FIRST", 20)
    monkeypatch.setattr(gates, "EVERY", 5)
    served = Counter[str]()

    async def tiring(request: Any) -> Any:
        served["images"] += 1
        return await with_headers(picture(), {}, 200 if served["images"] <= 40 else 404)(request)

    paths = [f"/{n}.png" for n in range(400)]
    with small_web(dict.fromkeys(paths, tiring)) as site:
        write_candidates(workspace, [site.url(path) for path in paths])
        with pytest.raises(PairmillError, match=r"× permanent/http_404"):
            fetch_increment(workspace, "src", SITE, FetchSpec(per_host=1, side_px=16), "0000", quiet)
    assert 56 <= served["images"] < 100


def test_a_fetch_that_fails_at_once_stops_at_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "FIRST", 20)
    with small_web({"/robots.txt": "x"}) as site:
        write_candidates(workspace, [site.url(f"/{n}.png") for n in range(300)])
        with pytest.raises(PairmillError, match=r"20 × permanent/http_404"):
            fetch_increment(workspace, "src", SITE, FetchSpec(per_host=1), "0000", quiet, 0.5)
        assert len(site.asked) < 60
    assert workspace.store.files("pairs") == []


async def test_a_preflight_tells_its_cause() -> None:
    async def broken(data: bytes) -> Failure:
        return Failure("permanent", "decoder_crash")

    with pytest.raises(PairmillError, match="preflight") as error:
        await preflight("pairmill", broken)
    assert "decoding fails" in error.value.remedy and "permanent/decoder_crash" in error.value.found


def test_a_shard_that_does_not_move_is_begun_anew_then_put_off(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image hangs once, another always: the first is there, the second is a row that may come again."""
    real, hung = shards.fetch_one, Counter[str]()

    async def hanging(tools: Any, row: Any, spool: Any) -> Any:
        name = row["url"].rpartition("/")[2]
        if name == "always.png" or (name == "once.png" and not hung[name]):
            hung[name] += 1
            tools.client.under_way[asyncio.current_task()] = time.monotonic()
            await asyncio.sleep(3600)
        return await real(tools, row, spool)

    monkeypatch.setattr(shards, "fetch_one", hanging)
    routes: dict[str, Any] = {
        f"/{name}.png": picture(size=(20 + n, 30)) for n, name in enumerate(("once", "always", "ok"))
    }
    lines: list[str] = []
    with small_web(routes) as site:
        write_candidates(workspace, [site.url(path) for path in routes])
        spec = FetchSpec(stuck_s=1.0, side_px=16)
        counts = fetch_increment(workspace, "src", SITE, spec, "0000", lambda d, t, note: lines.append(note))
        assert site.asked.count("/ok.png") == 1
    assert counts.ok == 2 and counts.failed == {"transient/stuck": 1} and hung == {"once.png": 1, "always.png": 2}
    assert lines[0].startswith("preflight: 3 of 3 images")


def test_what_failed_for_a_time_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, now = FetchSpec(retry_hours=1, retry_hours_max=10), 1e9
    monkeypatch.setattr("pipelines.fetch.ledger.time.time", lambda: now)

    def ago(*hours: float) -> list[Passing]:
        return [Passing(now - 3600 * h) for h in hours]

    assert due(ago(1.1), spec) and not due(ago(0.9), spec)
    assert not due(ago(9, 3.9), spec) and due(ago(9, 4.1), spec)
    assert due(ago(99, 90, 10.1), spec), "the wait is capped"
    assert due(ago(0), FetchSpec(retry_hours=0))
    assert not due([Passing(now - 9e9, now + 1), Passing(now - 8e9)], spec) and due([Passing(0, now - 1)], spec)


def test_the_ledger_of_these_settings_says_what_comes_again(workspace: Workspace) -> None:
    spec, at = FetchSpec(), datetime.now(UTC)

    def write(mark: str, statuses: dict[str, str], when: datetime, reason: str | None = None) -> None:
        rows = [{"url_key": k, "status": s, "started_at": when, "reason": reason} for k, s in statuses.items()]
        path = f"ledger/my-web-{mark}/0000/00000.parquet"
        workspace.store.write_table(path, pa.Table.from_pylist(rows, schema=LEDGER))

    write("aaaaaaaaaaaa", {"a": "transient", "b": "ok"}, at - timedelta(hours=2))
    write("bbbbbbbbbbbb", {"a": "ok", "b": "transient"}, at)
    assert passing_failures(workspace.store, "my-web", "0000", spec).keys() == {"b"}  # the latest of others
    write(fetch_fingerprint(spec), {"a": "transient", "b": "ok"}, at)
    assert passing_failures(workspace.store, "my-web", "0000", spec).keys() == {"a"}
    assert passing_failures(workspace.store, "web", "0000", spec) == {}
    keys = [f"{n:032x}" for n in (0, 7 << 124, 7 << 124 | 1, 8 << 124)]  # with zeros at their ends too
    workspace.store.write_table(part("my-web", "0000"), pa.table({"url_key": keys}))
    write("cccccccccccc", {keys[1]: "refused", "c" * 32: "refused"}, at, "noai")
    found = settled(workspace.store, "my-web", f"my-web-{fetch_fingerprint(spec)}", "0000")
    assert [found.get(key) for key in keys] == [None, "noai", None, None] and Settled().get(keys[0]) is None


def test_a_site_that_names_a_time_is_left_alone_until_then_by_later_runs_too(workspace: Workspace) -> None:
    """Its row waits longer than `retry_hours`, and its other addresses aren't asked for in the meantime."""
    busy, spec = with_headers(b"", {"Retry-After": "7200"}, 503), FetchSpec(attempts=1, retry_hours=0, side_px=16)
    with small_web({"/0.png": busy, "/1.png": picture()}) as site, small_web({"/2.png": picture()}, "127.0.0.2") as two:
        write_candidates(workspace, [site.url("/0.png")])
        fetch_increment(workspace, "src", SITE, spec, "0000", quiet)
        ((key, failed),) = passing_failures(workspace.store, "src", "0000", spec).items()
        assert key == url_key(site.url("/0.png")) and not due([failed], spec)
        assert failed.rests_until == pytest.approx(time.time() + 7200, abs=30)
        later = workspace.store.read_table(part("src", "0000"))
        write_candidates(workspace, [site.url("/1.png"), two.url("/2.png")])
        workspace.store.write_table(part("src", "0001"), workspace.store.read_table(part("src", "0000")))
        workspace.store.write_table(part("src", "0000"), later)
        counts = fetch_increment(workspace, "src", SITE, spec, "0001", quiet)
        assert counts.ok == 1 and counts.failed == {"transient/host_rests": 1} and "/1.png" not in site.asked
    assert not due(passing_failures(workspace.store, "src", "0001", spec).values(), spec)


def test_a_rest_learnt_behind_a_redirect_or_before_a_kill_holds_for_that_host_under_other_settings(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    busy = with_headers(b"", {"Retry-After": "7200"}, 429)
    with (
        small_web({"/b.png": busy, "/1.png": picture()}, "127.0.0.2") as two,
        small_web({"/a.png": redirect(two.url("/b.png")), "/2.png": picture()}) as one,
    ):
        write_candidates(workspace, [one.url("/a.png")])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shards, "save_policies", killed)  # at the end, as the last shard has been published
            fetch_increment(workspace, "src", SITE, FetchSpec(side_px=16), "0000", quiet)
        assert two.asked[-1] == "/b.png" and load_rests(workspace.store).keys() == {"127.0.0.2"}
        write_candidates(workspace, [one.url("/2.png"), two.url("/1.png")])
        counts = fetch_increment(workspace, "src", SITE, FetchSpec(side_px=24), "0000", quiet)
        assert counts.ok == 1 and counts.failed == {"transient/robots_host_rests": 1} and two.asked[-1] == "/b.png"


def test_a_crawl_that_is_told_to_wait_tells_the_fetch(tmp_path: Path, workspace: Workspace) -> None:
    busy = with_headers(b"", {"Retry-After": "7200"}, 503)
    page = "<img src=1.png alt=a><a href=busy.html>x</a>"
    with small_web({"/": page, "/busy.html": busy, "/1.png": picture()}) as site:
        spec = SourceSpec.model_validate({"kind": "site", "seeds": [site.url("/")], "allow": ALLOW, "delay_s": 0.0})
        assert cut_increment(workspace, "web", spec, FetchSpec(), quiet).new == 1
        counts = fetch_increment(workspace, "web", spec, FetchSpec(), "0000", quiet)
    assert counts.failed == {"transient/host_rests": 1} and "/busy.html" in site.asked and "/1.png" not in site.asked


def test_rests_that_are_over_are_dropped(workspace: Workspace) -> None:
    store, now = workspace.store, time.time()
    save_rests(store, {"a.test": now + 0.05, "bücher.test": now + 99, "::1": now + 99})
    time.sleep(0.1)
    assert load_rests(store) == {"bücher.test": now + 99, "::1": now + 99}
    save_rests(store, {"a.test": now - 1})
    assert store.read_table(RESTS).num_rows == 0
    store.write(RESTS, b"damaged")
    assert load_rests(store) == {}


@pytest.mark.parametrize("value", [NEVER, "99999999"])
def test_a_retry_after_beyond_all_time_costs_its_own_row_alone(workspace: Workspace, value: str) -> None:
    routes: dict[str, Any] = {"/0.png": with_headers(b"", {"Retry-After": value}, 503)}
    with small_web(routes) as site, small_web({"/1.png": picture()}, "127.0.0.2") as two:
        write_candidates(workspace, [site.url("/0.png"), two.url("/1.png")])
        spec = FetchSpec(side_px=16)
        counts = fetch_increment(workspace, "src", SITE, spec, "0000", quiet)
        assert counts.ok == 1 and counts.failed == {"transient/http_503": 1}
    [waits] = [row["retry_at"] - row["started_at"] for row in ledger_of(workspace, spec) if row["retry_at"]]
    assert waits.total_seconds() == pytest.approx(RETRY_AFTER_MAX_S, abs=60)


def test_a_site_that_said_no_is_not_asked_again_with_other_settings(workspace: Workspace) -> None:
    with small_web({"/a.png": with_headers(picture(), {"X-Robots-Tag": "noai"}), "/b.png": picture()}) as site:
        write_candidates(workspace, [site.url("/a.png"), site.url("/b.png")])
        for side in (16, 24):
            counts = fetch_increment(workspace, "src", SITE, FetchSpec(side_px=side), "0000", quiet)
            assert counts.ok == 1 and counts.failed == {"refused/noai": 1}
        assert site.asked.count("/a.png") == 1 and site.asked.count("/b.png") == 2


def photo(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return encoded(Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC))


def test_what_is_on_a_blocklist_is_never_written(workspace: Workspace, tmp_path: Path) -> None:
    images = {f"/{n}.png": photo(n) for n in range(4)}
    again = Image.open(io.BytesIO(images["/2.png"])).resize((150, 150))  # the same picture, other bytes
    images["/copy.png"] = encoded(again, "JPEG", quality=60)
    phash = hashes(np.asarray(Image.open(io.BytesIO(images["/2.png"])).convert("RGB")))["phash"]
    files = {
        "hosts": "# comment\n127.0.0.3\nbad.test\n",
        "sha256": sha256_hex(images["/1.png"]).upper() + "  # a case\n",
        "perceptual": phash + "\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    block = BlockSpec(**{name: str(tmp_path / name) for name in files}, radius=6)
    with small_web(dict(images)) as site, small_web({"/x.png": picture()}, "127.0.0.3") as other:
        write_candidates(workspace, [*(site.url(path) for path in images), other.url("/x.png")])
        spec = FetchSpec(side_px=64, block=block)
        counts = fetch_increment(workspace, "src", SITE, spec, "0000", quiet)
        assert other.asked == []
        found = {row["url"].rpartition("/")[2]: row["reason"] for row in ledger_of(workspace, spec)}
    assert found == {
        **{"0.png": None, "1.png": "block_sha256", "2.png": "block_hash", "3.png": None},
        **{"copy.png": "block_hash", "x.png": "block_host"},
    }
    assert counts.ok == 2 and counts.refused == 4


@pytest.mark.parametrize(
    ("name", "line"), [("hosts", "http://a.test/"), ("sha256", "abc"), ("perceptual", "0" * 15 + "g"), ("hosts", None)]
)
def test_a_blocklist_with_another_form_is_told(tmp_path: Path, name: str, line: str | None) -> None:
    if line:
        (tmp_path / "list").write_text(f"\n{line}\n")
    with pytest.raises(PairmillError, match="list:2" if line else rf"fetch\.block\.{name}"):
        load_blocklists(BlockSpec(**{name: str(tmp_path / "list")}))


def test_a_host_on_the_list_covers_its_subdomains(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("Bad.Test\n")
    blocked = load_blocklists(BlockSpec(hosts=str(tmp_path / "list")))
    assert blocked.host("BAD.test.") and blocked.host("a.b.bad.test")
    assert not blocked.host("notbad.test") and not blocked.host("test")


def test_the_colours_of_the_original_are_recorded() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    spec = DecodeSpec(16, "png", 92, 10_000, 8)
    resize = load_resizer(spec)
    cases = {
        encoded(Image.new("RGB", (20, 20))): None,
        encoded(Image.new("L", (20, 20))): "grey",
        encoded(Image.new("LA", (20, 20))): "alpha grey",
        encoded(Image.new("RGBA", (20, 20))): "alpha",
        encoded(Image.new("CMYK", (20, 20)), "JPEG"): "cmyk",
        encoded(Image.new("P", (20, 20))): "palette",
        encoded(Image.fromarray(np.full((20, 20), 0x8000, np.uint16))): "deep grey",
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]): "animated",
    }
    assert [decode(data, spec, resize).facts["colour"] for data in cases] == list(cases.values())


def test_an_agent_without_a_contact_is_told_before_anything_is_sent(workspace: Workspace) -> None:
    with small_web({"/a.png": picture()}) as site:
        write_candidates(workspace, [site.url("/a.png"), "http://a.test/b.png"])
        with pytest.raises(PairmillError, match=r"fetch\.agent"):
            fetch_increment(workspace, "src", SITE, FetchSpec(), "0000", quiet)
        assert site.asked == []
