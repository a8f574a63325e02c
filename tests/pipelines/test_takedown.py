"""Takedown: what is meant is found, nothing of it is left, nothing else moves, and a kill at any write is mended."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairs.errors import PairmillError
from pairs.identity import sha256_hex, url_key
from pairs.process import ROOT
from pairs.recipe import FetchSpec, SourceSpec
from pairs.shard import list_shards, read_shard
from pairs.store import Store, table_metadata
from pairs.verify import verify
from pairs.workspace import Workspace, refused
from pipelines.candidates import cut_increment
from pipelines.fetch.policies import RESTS, load_rests, save_rests
from pipelines.fetch.shards import fetch_increment
from pipelines.takedown import finish, forget
from tests.pairs.small import FOLDER, fill, image, pair_row
from tests.pipelines import flow
from tests.pipelines.conftest import Finished
from tests.pipelines.small_web import ALLOW, picture, redirect, small_web

CAPTION = "a machine's own words on number {}"
SECRET = [value for i in (1, 5) for value in (pair_row(i)["url"], pair_row(i)["text"], CAPTION.format(i))]
ASKED = {"uids": [pair_row(1)["uid"]], "urls": [pair_row(5)["url"], "http://never.test/seen.jpg"]}


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """The small workspace, with synthetic captions, a canary of pair 1, and free text about pairs 1 and 5."""
    space = fill(Workspace.open(tmp_path / "w", create=True))
    store, local = space.store, space.store.local
    assert local
    for ref in list_shards(store, "pairs"):
        uids = store.read_table(ref.table, ["uid"])["uid"].to_pylist()
        numbers = [next(i for i in range(9) if pair_row(i)["uid"] == uid) for uid in uids]
        table = pq.read_table(local / ref.beside("scores/text_stats-aaaaaaaaaaaa"))
        table = table.append_column("texts", [[[CAPTION.format(i)] for i in numbers]])
        store.write_table(ref.beside("scores/blip_caption-aaaaaaaaaaaa"), table)
    shutil.copytree(local / FOLDER, local / "canaries/swapped_text-dddddddddddd/0000")
    table = store.read_table("canaries/swapped_text-dddddddddddd/0000/00000.parquet")
    origins = table.set_column(table.column_names.index("source_uid"), "source_uid", table["uid"])
    store.write_table("canaries/swapped_text-dddddddddddd/0000/00000.parquet", origins)
    store.delete("canaries/swapped_text-dddddddddddd/0000/00001.tar")
    store.delete("canaries/swapped_text-dddddddddddd/0000/00001.parquet")
    store.write_table(
        "scores/canary_facts-dddddddddddd/swapped_text-dddddddddddd/0000/00000.parquet", table.select(["uid"])
    )
    store.write_table("asked/near_duplicates-aaaaaaaaaaaa-bbbbbbbbbbbb.parquet", pa.table({"group": [SECRET[0]]}))
    _free_text(store, local)
    return space


def _free_text(store: Store, local: Path) -> None:
    told = " and ".join(SECRET)
    run = "runs/small-cccccccccccc-0001"
    store.write(f"{run}/round-1/abc/logs/rank0.log", f"damaged: {told}\n")
    stages = {"fetch": {"state": "failed", "started": 1.0, "error": f"could not read {told}"}}
    store.write(f"{run}/stages.json", json.dumps(stages))
    page = {"url": "http://host0.test/", "images": [{"url": pair_row(i)["url"], "texts": []} for i in (1, 2)]}
    store.write("crawl/web/0001/pages.jsonl", json.dumps({"settings": "x"}) + "\n" + json.dumps(page) + "\n")
    (local / "prefect").mkdir()
    base = sqlite3.connect(local / "prefect/prefect.db")
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("CREATE TABLE log (message TEXT, data JSON)")
    base.execute("INSERT INTO log VALUES (?, ?)", (told, json.dumps({"why": told})))
    base.execute("INSERT INTO log VALUES (?, ?)", (told * 40, None))
    base.commit()
    base.execute("DELETE FROM log WHERE data IS NULL")
    base.commit()
    base.close()


def left(space: Workspace) -> dict[str, list[str]]:
    """Which secrets stand in which file, Parquet's decompressed."""
    found = {}
    for path in space.store.files(""):
        raw = space.store.read(path).decode("utf-8", "replace")
        plain = raw
        if raw.startswith("PAR1"):
            table = space.store.read_table(path)
            plain = "\0".join([str(table.to_pylist()), *table_metadata(table).values()])
        names = [word for word in SECRET if word in plain or json.dumps(word)[1:-1] in plain]
        found |= {path: names} if names else {}
    return found


def contents(space: Workspace) -> dict[str, bytes]:
    """Every file but audit records, which name times, and databases."""
    files = (p for p in space.store.files("") if not p.startswith(("forgotten/", "prefect/", ".")))
    return {path: space.store.read(path) for path in files}


def alone(holder: str) -> None:
    raise AssertionError(f"waits for {holder}")


def test_nothing_is_left_and_nothing_else_moves(space: Workspace) -> None:
    assert len(left(space)) >= 14, "the search sees what is there"
    before = {ref: read_shard(space.store, ref) for ref in list_shards(space.store, "pairs")}
    facts = forget(space, ASKED, "asked for", alone)
    assert left(space) == {}
    verdict = verify(space)
    assert (verdict.problems, verdict.unfinished) == ([], [])
    assert facts["state"] == "done" and facts["rewritten"]["pairs"] == 2 == facts["rewritten"]["candidates"]
    for ref, shard in before.items():
        now = read_shard(space.store, ref)
        for old, new, data in zip(shard.table.to_pylist(), now.table.to_pylist(), now.images(), strict=True):
            assert (old["uid"], old["url_key"]) == (new["uid"], new["url_key"])
            if new["status"] == "ok":
                assert data == image(next(i for i in range(9) if pair_row(i)["uid"] == new["uid"]))
            else:
                assert {n for n, v in new.items() if v is not None} == {"uid", "url_key", "status"}
    assert list_shards(space.store, "canaries") == [] and space.store.files("scores", "0.parquet")
    assert space.store.files("asked") == []
    lines = space.store.read("crawl/web/0001/pages.jsonl").decode().splitlines()
    assert [i["url"] for i in json.loads(lines[1])["images"]] == [pair_row(2)["url"]]
    assert json.loads(space.store.read("runs/small-cccccccccccc-0001/stages.json"))["fetch"]["state"] == "failed"


def test_errors_that_quote_a_pair_go_with_it(space: Workspace) -> None:
    """Of a row that couldn't be measured, which is empty, too."""
    path = next(p for p in space.store.files("scores", ".parquet") if "text_stats" in p)
    table = space.store.read_table(path)
    uids = table["uid"].to_pylist()
    row, other = uids.index(pair_row(1)["uid"]), uids.index(pair_row(2)["uid"])
    empty = pa.Table.from_pylist([{"uid": uid} for uid in uids], table.schema.remove_metadata())
    errors = {f"odd: {pair_row(1)['text']}": [row], "odd": sorted([row, other])}
    space.store.write_table(path, empty, table_metadata(table) | {"errors": json.dumps(errors)})
    assert path in left(space)
    forget(space, ASKED, "asked for", alone)
    assert table_metadata(space.store.read_table(path)) == table_metadata(table) | {"errors": f'{{"odd": [{other}]}}'}
    assert left(space) == {}


def test_a_merge_beside_it_that_takes_a_table_away_does_not_end_it(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing names, now and then, a file that is merged into another before it is read."""
    listed, times = Store.files, [0]

    def longer(self: Store, prefix: str, suffix: str = "") -> list[str]:
        times[0] += prefix == "ledger"
        return listed(self, prefix, suffix) + ["ledger/gone.parquet"] * (prefix == "ledger" and times[0] <= missing)

    monkeypatch.setattr(Store, "files", longer)
    missing = 1
    assert forget(space, ASKED, "asked for", alone)["state"] == "done" and times[0] > 2
    missing, times[0] = 3, 0
    with pytest.raises(FileNotFoundError):
        forget(space, ASKED, "asked for", alone)
    monkeypatch.undo()
    assert left(space) == {}


def test_the_audit_record_says_nothing_of_the_pairs(space: Workspace) -> None:
    facts = forget(space, ASKED, "asked for", alone)
    record = json.loads(space.store.read("forgotten/0000.json"))
    assert record == facts and record["reason"] == "asked for"
    assert set(record["ids"]["uid"]) == {pair_row(1)["uid"], pair_row(5)["uid"]}
    assert url_key("http://never.test/seen.jpg") in record["ids"]["url_key"]
    assert finish(space) == {}, "what is done isn't done again"


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        ({"urls": [pair_row(3)["url"].replace("host", "HOST") + "#x"]}, {3}),
        ({"uids": [pair_row(2)["uid"].upper()]}, {2}),
        ({"hosts": ["host1.test"]}, {1, 3, 5, 7}),
        ({"hosts": ["test."]}, set(range(9))),
        ({"sha256": [pair_row(4)["sha256"]]}, {4}),
    ],
)
def test_each_option_finds_what_it_means(space: Workspace, asked: dict[str, list[str]], numbers: set[int]) -> None:
    forget(space, asked, "asked for", alone)
    table = space.store.read_table("candidates/web/0000/part-00000.parquet")
    gone = {key for key, url in zip(table["url_key"].to_pylist(), table["url"].to_pylist(), strict=True) if url is None}
    assert gone == {pair_row(i)["url_key"] for i in numbers}
    assert verify(space).ok


@pytest.mark.parametrize(
    "asked", [{"uids": ["x"]}, {"hosts": ["a b"]}, {"hosts": ["a.test/x"]}, {"sha256": ["ab"]}, {"urls": ["x.jpg"]}]
)
def test_a_line_that_means_nothing_is_refused(space: Workspace, asked: dict[str, list[str]]) -> None:
    before = contents(space)
    with pytest.raises(PairmillError, match="correct this line"):
        forget(space, asked, "asked for", alone)
    assert contents(space) == before


class Killed(BaseException):
    """As a SIGKILL between two writes."""


@pytest.mark.timeout(300)
def test_killed_at_any_write_the_same_command_ends_it(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, delete, counted = Store._publish, Store.delete, [0, 10**9]

    def after(step: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            if counted[0] == counted[1]:
                raise Killed
            counted[0] += 1
            step(*arguments, **options)

        return run

    monkeypatch.setattr(Store, "_publish", after(publish))
    monkeypatch.setattr(Store, "delete", after(delete))
    whole = Workspace.open(flow.copied(Path(space.store.root), tmp_path / "whole"))
    forget(whole, ASKED, "asked for", alone)
    steps = counted[0]
    assert steps > 15
    for step in range(steps):
        copy = Workspace.open(flow.copied(Path(space.store.root), tmp_path / f"copy-{step}"))
        counted[:] = [0, step]
        with pytest.raises(Killed):
            forget(copy, ASKED, "asked for", alone)
        if step:  # the tombstones are the first write
            assert not verify(copy).ok or step == steps - 1
        counted[:] = [0, 10**9]
        forget(copy, ASKED, "asked for", alone)
        assert left(copy) == {} and verify(copy).problems == [], step
        assert contents(copy) == contents(whole), step
        assert finish(copy) == {}
        shutil.rmtree(copy.store.root)


def test_it_waits_for_a_writer_and_holds_at_once(space: Workspace) -> None:
    waits, told = threading.Event(), []
    with space.lock():
        thread = threading.Thread(target=forget, args=(space, ASKED, "", lambda h: (told.append(h), waits.set())))
        thread.start()
        assert waits.wait(30) and "process" in told[0]
        table = space.store.read_table(f"{FOLDER}/00000.parquet")
        assert [row["uid"] for row, lives in zip(table.to_pylist(), space.alive(table), strict=True) if not lives] == [
            pair_row(1)["uid"]
        ], "no reader sees it any more"
        assert left(space), "files are rewritten later"
    thread.join(30)
    assert left(space) == {} and verify(space).ok


def test_without_waiting_the_next_writer_rewrites(space: Workspace) -> None:
    facts = forget(space, ASKED, "asked for", None)
    assert facts["state"] == "buried" and left(space)
    problems = verify(space).problems
    assert problems and all("run `pairmill forget`" in what for _, what in problems)
    assert finish(space)["state"] == "done"
    assert left(space) == {} and verify(space).ok


def test_hosts_and_bytes_do_not_come_back(tmp_path: Path) -> None:
    space = Workspace.open(tmp_path / "w", create=True)
    routes = {"/0.png": picture("red"), "/1.png": picture("blue"), "/2.png": picture("green")}
    with small_web(routes) as site:
        (tmp_path / "web.csv").write_text("url,text\n" + "".join(f"{site.url(p)},a square\n" for p in routes))
        spec = SourceSpec(kind="urls", allow=ALLOW, path=str(tmp_path / "web.csv"))
        forget(space, {"sha256": [sha256_hex(routes["/1.png"])]}, "", alone)
        assert cut_increment(space, "web", spec, FetchSpec(), lambda *_: None).new == 3
        counts = fetch_increment(space, "web", spec, FetchSpec(), "0000", lambda *_: None)
        assert counts.ok == 2 and counts.failed == {"refused/forgotten": 1}
        facts = forget(space, {"hosts": ["127.0.0.1"]}, "", alone)
        assert facts["rewritten"]["pairs"] == 2 and verify(space).ok
        (tmp_path / "web.csv").write_text(f"url,text\n{site.url('/new.png')},a square\n")
        later = cut_increment(space, "web", spec, FetchSpec(), lambda *_: None)
        assert later.new == 0 and later.dropped == {"forgotten": 1}
    assert refused({"url_key": set(), "host": {"a.test"}}, "k", "http://x.A.test:81/1.jpg")
    assert not refused({"url_key": set(), "host": {"a.test"}}, "k", "http://ba.test/1.jpg")


def test_forgotten_bytes_at_a_new_address_leave_its_key_alone(tmp_path: Path) -> None:
    space, blue = Workspace.open(tmp_path / "w", create=True), picture("blue")
    with small_web({"/0.png": picture("red"), "/copy.png": blue}) as site:
        (tmp_path / "web.csv").write_text("url,text\n" + "".join(f"{site.url(p)},a square\n" for p in site.routes))
        spec = SourceSpec(kind="urls", allow=ALLOW, path=str(tmp_path / "web.csv"))
        forget(space, {"sha256": [sha256_hex(blue)]}, "asked for", alone)
        cut_increment(space, "web", spec, FetchSpec(), lambda *_: None)
        fetch_increment(space, "web", spec, FetchSpec(), "0000", lambda *_: None)
        copy, key = site.url("/copy.png"), url_key(site.url("/copy.png"))
    rewritten = finish(space)["rewritten"]
    assert (rewritten["ledger"], rewritten["candidates"], rewritten["pairs"]) == (1, 1, 0)
    for kind in ("candidates", "ledger"):
        [path] = space.store.files(kind, ".parquet")
        [row] = [row for row in space.store.read_table(path).to_pylist() if row["url_key"] == key]
        told = {name: value for name, value in row.items() if value is not None}
        assert told == {"url_key": key} | ({"status": "refused", "reason": "forgotten"} if kind == "ledger" else {})
    assert not [p for p in space.store.files("") if copy.encode() in space.store.read(p)] and verify(space).ok
    assert finish(space) == {}


def test_a_fetch_goes_on_after_a_rewriting_takedown(tmp_path: Path) -> None:
    space = Workspace.open(tmp_path / "w", create=True)
    with small_web({"/0.png": picture("red"), "/1.png": picture("blue")}) as site:
        (tmp_path / "web.csv").write_text(f"url,text\n{site.url('/0.png')},a square\n{site.url('/1.png')},a square\n")
        spec = SourceSpec(kind="urls", allow=ALLOW, path=str(tmp_path / "web.csv"))
        cut_increment(space, "web", spec, FetchSpec(), lambda *_: None)
        assert forget(space, {"urls": [site.url("/0.png")]}, "", alone)["rewritten"]["candidates"] == 1
        for side in (16, 32):
            counts = fetch_increment(space, "web", spec, FetchSpec(side_px=side), "0000", lambda *_: None)
            assert counts.ok == 1 and counts.failed == {"refused/forgotten": 1}
        assert "/0.png" not in site.asked
    assert verify(space).problems == []


def test_a_crawl_gives_nothing_back(space: Workspace) -> None:
    """Its records, what is merged or read of archives, a line that a kill has torn, and the cache."""
    store, gone = space.store, pair_row(1)["url"]
    page = {"url": "http://host0.test/", "links": [gone, pair_row(2)["url"]], "images": [], "redirect": gone}
    sitemap = {"sitemap": "http://host0.test/s.xml", "links": [gone], "more": [gone]}
    lines = "".join(json.dumps(line) + "\n" for line in ({"settings": "x"}, page, sitemap, {"url": gone}))
    table = store.read_table("candidates/web/0000/part-00000.parquet").select(["url_key", "url"])
    files = {"crawl/web/0001/pages.jsonl": lines.encode() + gone.encode(), "cache/pages/web.jsonl": lines.encode()}
    tables = ("crawl/web/0001/files/a.parquet", "cache/policies.parquet")
    for path in (*files, *tables):
        store.write(path, files[path]) if path in files else store.write_table(path, table)
    with store.writing("crawl/web/0001/merge/rows-00000.arrow") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    space.bury("url_key", [pair_row(1)["url_key"]], "asked for")
    named = {path for path, _ in verify(space).problems}
    assert named >= {*files, *tables, "crawl/web/0001/merge/rows-00000.arrow"}
    forget(space, ASKED, "asked for", alone)
    assert left(space) == {} and verify(space).problems == []
    assert store.files("cache") == [] and store.files("crawl", "pages.jsonl") == store.files("crawl")
    kept = [json.loads(line) for line in store.read("crawl/web/0001/pages.jsonl").decode().splitlines()]
    assert kept[1] == page | {"links": [pair_row(2)["url"]], "redirect": None} and len(kept) == 3


def test_a_forgotten_host_is_asked_for_nothing(tmp_path: Path) -> None:
    """Neither by a crawl whose links, redirects or sitemaps lead there nor by the redirect of an image."""
    space = Workspace.open(tmp_path / "w", create=True)
    with small_web({"/2.html": "<img src=2.png alt=b>", "/x.png": picture()}, "127.0.0.2") as dead:
        links = f"<a href='{dead.url('/2.html')}'>x</a><a href='/moved'>y</a>"
        routes: dict[str, Any] = {"/": f"<img src=1.png alt=a>{links}", "/1.png": redirect(dead.url("/x.png"))}
        with small_web(routes | {"/moved": redirect(dead.url("/2.html"))}) as site:
            forget(space, {"hosts": ["127.0.0.2"]}, "", alone)
            more = {"hosts": ["127.0.0.2"], "sitemaps": [dead.url("/s.xml")], "delay_s": 0}
            settings = {"kind": "site", "seeds": [site.url("/")], "allow": ALLOW, **more}
            spec = SourceSpec.model_validate(settings)
            assert cut_increment(space, "web", spec, FetchSpec(), lambda *_: None).new == 1
            counts = fetch_increment(space, "web", spec, FetchSpec(), "0000", lambda *_: None)
        assert counts.failed == {"refused/forgotten": 1} and dead.asked == []


def test_a_forgotten_host_rests_no_more_and_the_others_do(space: Workspace) -> None:
    later = time.time() + 7200
    save_rests(space.store, {"host0.test": later, "a.host1.test": later, "host2.test": later})
    space.bury("host", ["host1.test"], "asked for")
    assert RESTS in {path for path, _ in verify(space).problems}
    forget(space, {"hosts": ["host0.test"]}, "", alone)
    assert load_rests(space.store) == {"host2.test": later} and verify(space).problems == []


def test_tables_without_rows_and_damaged_ones_hold_no_takedown_back(space: Workspace) -> None:
    for path in ("candidates/web/0000/part-00000.parquet", f"{FOLDER}/00000.parquet"):
        empty = space.store.read_table(path)[:0]
        space.store.write_table(path.replace("00000", "00009").replace("web/0000", "web/0009"), empty)
    forget(space, {"hosts": ["host1.test"]}, "", alone)
    assert pair_row(1)["url_key"] in space.tombstones()["url_key"]
    space.store.write(f"{FOLDER}/00008.parquet", b"damaged")
    with pytest.raises(PairmillError, match="a Parquet table"):
        forget(space, {"hosts": ["host0.test"]}, "", alone)
    assert "host0.test" in space.tombstones()["host"]


def shown(told: Any) -> list[dict[str, Any]]:
    """Every card (an object with a uid and an image) of a report."""
    if isinstance(told, list):
        return [card for item in told for card in shown(item)]
    if not isinstance(told, dict):
        return []
    return [told] if {"uid", "image"} <= set(told) else shown(list(told.values()))


@pytest.mark.timeout(400)
def test_a_finished_run_goes_on_without_them(finished: Finished, tmp_path: Path) -> None:
    """Pins of earlier trainings don't hold any more: the same command trains a new model, and reuses what it can."""
    root = tmp_path / "workspace"
    space = Workspace.open(flow.copied(finished.workspace, root))
    report = json.loads(space.store.read(f"{finished.run.folder}/report.json"))
    cards = shown(report)
    shares = {image: {c["uid"] for c in cards if c["image"] == image} for image in {c["image"] for c in cards}}
    uids = sorted({uid for sharers in shares.values() if len(sharers) == 1 for uid in sharers})[:4]
    facts = forget(space, {"uids": uids}, "asked for", alone)
    page = space.store.read(f"{finished.run.folder}/report.html").decode()
    report = space.store.read(f"{finished.run.folder}/report.json").decode()
    assert len(uids) == 4 and not [uid for uid in uids if uid in report]
    assert not [card["uid"] for card in cards if card["uid"] in uids and card["image"] in page]
    assert {card["uid"] for card in shown(json.loads(report))} == {card["uid"] for card in cards} - set(uids)
    assert verify(space).problems == []
    trainings = {t["training"].split("/")[2]: t for t in facts["trainings"]}
    steps = finished.run.recipe.pretrain.steps
    assert trainings["round-1"]["finished"] and set(trainings["round-1"]["pairs"]) <= set(uids)
    assert 0 < sum(trainings["round-1"]["pairs"].values()) <= steps * finished.run.recipe.pretrain.batch_pairs
    again, told = flow.run_stages(finished.recipe, root)
    before = json.loads(space.store.read(f"{finished.run.folder}/stages.json"))["round-1/pretrain"]
    assert "round-1/pretrain" not in again.reused and "crawl" in again.reused and "fetch" in again.reused
    assert before["training"] not in trainings["round-1"]["training"]
    funnel = {row["step"]: row for row in told["rounds"][0]["funnel"]}
    assert funnel["forgotten"]["dropped"] == len(uids)
    assert json.loads(again.workspace.store.read(f"{again.folder}/report.json"))["rounds"][0]["adds_up"]
    assert verify(space).problems == []


def test_the_command_line(space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "uids").write_text("\n".join(ASKED["uids"]) + "\n\n")
    (tmp_path / "urls").write_text("\n".join(ASKED["urls"]))
    files = ["--uids", str(tmp_path / "uids"), "--urls", str(tmp_path / "urls")]
    told = flow.command(capsys, "forget", space.store.root, *files, "--json", "--reason", "asked by mail")
    assert told.code == 0 and told.json["state"] == "done" and told.json["reason"] == "asked by mail"
    assert left(space) == {}
    assert flow.command(capsys, "verify", space.store.root).code == 0
    assert flow.command(capsys, "forget", space.store.root).code == 0
    assert flow.command(capsys, "forget", space.store.root, "--uids", str(tmp_path / "none")).code == 2


def test_a_database_in_use_is_told_and_the_rest_waits(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.scrub.BUSY_S", 0.1)
    base = sqlite3.connect(Path(space.store.root) / "prefect/prefect.db", isolation_level=None)
    base.execute("BEGIN IMMEDIATE")
    with pytest.raises(PairmillError, match="end the schedule"):
        forget(space, ASKED, "asked for", alone)
    base.execute("COMMIT")
    base.close()
    assert finish(space)["state"] == "done" and left(space) == {} and verify(space).ok


@contextmanager
def a_server(path: Path) -> Iterator[None]:
    """Writes to a database in short transactions, over a connection that stays open, as Prefect's server does."""
    stop, written = threading.Event(), threading.Event()

    def write() -> None:
        base = sqlite3.connect(path, timeout=30, isolation_level=None)
        while not stop.wait(0.01):
            base.execute("INSERT INTO log VALUES ('a heartbeat', NULL)")
            written.set()
        base.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert written.wait(10)
        yield
    finally:
        stop.set()
        thread.join(10)


def test_a_server_that_writes_meanwhile_is_waited_for(space: Workspace) -> None:
    database = Path(space.store.root) / "prefect/prefect.db"
    with a_server(database):
        assert forget(space, ASKED, "asked for", alone)["state"] == "done"
        assert left(space) == {} and verify(space).ok
    with contextlib.closing(sqlite3.connect(database)) as base:
        assert base.execute("SELECT count(*) FROM log WHERE message = 'a heartbeat'").fetchone()[0] > 0
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_forgets_while_its_own_server_holds_the_database(tmp_path: Path) -> None:
    """The takedown at the end of a stage takes an address out of the database of the server that the run reports to."""
    root, code = tmp_path / "w", "from pipelines.cli import main; main()"
    recipe = tmp_path / "recipe.yaml"
    with small_web({"/0.png": picture("red"), "/1.png": picture("blue")}) as site:
        (tmp_path / "web.csv").write_text("url,text\n" + "".join(f"{site.url(p)},a square\n" for p in site.routes))
        web = {"kind": "urls", "path": str(tmp_path / "web.csv"), "allow": ALLOW}
        recipe.write_text(json.dumps({"name": "held", "sources": {"web": web}}))
        fetch = [sys.executable, "-c", code, "fetch", str(recipe), "--workspace", str(root)]
        subprocess.run(fetch, cwd=ROOT, check=True)
        space, gone = Workspace.open(root), site.url("/1.png")
        with contextlib.closing(sqlite3.connect(root / "prefect/prefect.db", isolation_level=None)) as base:
            base.execute("CREATE TABLE told (message TEXT)")
            base.execute("INSERT INTO told VALUES (?)", (f"could not read {gone}",))
        assert forget(space, {"urls": [gone]}, "asked for", None)["state"] == "buried"
        subprocess.run(fetch, cwd=ROOT, check=True)
    databases = (root / "prefect").glob("prefect.db*")
    assert not [path for path in databases if gone.encode() in path.read_bytes()] and verify(space).ok
    assert finish(space) == {}, "the run did it"


def test_a_reader_that_stays_is_told_and_the_rest_waits(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is clean then, but its write-ahead log still has the old pages."""
    monkeypatch.setattr("pipelines.scrub.BUSY_S", 0.1)
    with contextlib.closing(
        sqlite3.connect(Path(space.store.root) / "prefect/prefect.db", isolation_level=None)
    ) as base:
        base.execute("BEGIN")
        base.execute("SELECT * FROM log").fetchall()
        with pytest.raises(PairmillError, match="end the schedule"):
            forget(space, ASKED, "asked for", alone)
        base.execute("COMMIT")
    assert finish(space)["state"] == "done" and left(space) == {} and verify(space).ok


def test_a_workspace_on_an_object_store(space: Workspace, memory_store: Store) -> None:
    """All but databases, which lie on local disk."""
    for path in (p for p in space.store.files("") if not p.startswith(("prefect/", "."))):
        memory_store.write(path, space.store.read(path))
    remote = Workspace.open(memory_store.root)
    before = len(left(remote))
    forget(space, ASKED, "asked for", alone)
    facts = forget(remote, ASKED, "asked for", alone)
    assert before >= 12 and left(remote) == {} and facts["state"] == "done"
    assert verify(remote).problems == [] and finish(remote) == {}
    assert contents(remote) == contents(space), "the same bytes as on local disk"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_does_not_disturb_a_running_curation(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "forget.py"), str(tmp_path / "b")]
    numbers = ["--pairs", "300", "--forget", "40", "--engine", "inline"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*command, *numbers], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["left"] == {}
