"""Compaction: small increments become one, and nothing that anybody knew of them is lost or done again."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from aiohttp import web

from filters.reduce import run_reducers
from filters.score_tables import told_by_tables
from filters.semantic_duplicates import SemanticDuplicates
from pairs.errors import PairmillError
from pairs.identity import url_key
from pairs.increments import MARK, exactly, following, holding, joined
from pairs.pretrain import BlipSpec
from pairs.process import ROOT
from pairs.recipe import FetchSpec
from pairs.shard import ShardRef, list_shards, read_shard
from pairs.store import Store, table_metadata
from pairs.verify import verify
from pairs.workspace import Workspace
from pipelines import stages
from pipelines.compact import compact
from pipelines.console import Console
from pipelines.fetch.ledger import tries
from pipelines.inspection import trace
from pipelines.joining import Merge, join
from pipelines.models import trained
from pipelines.run import Run, open_run
from pipelines.takedown import forget
from tests.pipelines import flow
from tests.pipelines.conftest import Finished
from tests.pipelines.small_web import ALLOW, SmallWeb, small_web
from training.config import BlipJob, Pin

pytestmark = pytest.mark.timeout(180)
LATE = 2  # how often /late.png fails before it comes
BATCHES = [range(0, 7), range(7, 12), range(12, 15), range(15, 20)]


@dataclass
class Scheduled:
    """A workspace to which nightly runs add; `site` counts what is asked for."""

    root: Path
    site: SmallWeb
    space: Path

    def add(self, names: list[str]) -> None:
        """Puts addresses on the list; one that stands there already isn't new."""
        path = self.root / "web.csv"
        known = path.read_text() if path.exists() else "url,text\n"
        path.write_text(known + "".join(f"{self.site.url(name)},a box of number {name[-5]}\n" for name in names))

    def run(self, new: bool = True) -> Run:
        """The next nightly run, to its report; without `new` the last one again."""
        run = open_run(self.root / "recipe.yaml", workspace=str(self.space), console=Console(True), new=new)
        with run.workspace.lock():
            stages.crawl(run)
            stages.fetch(run)
            stages.curate(run, 1, {"name": "none", "models": {}})
            stages.report(run)
        return run

    @property
    def workspace(self) -> Workspace:
        return Workspace.open(self.space)


def nightly(root: Path) -> dict[str, Any]:
    source = {"kind": "urls", "path": f"{root}/web.csv", "columns": {"url": "url", "text": "text"}, "allow": ALLOW}
    return {
        "name": "nightly",
        "sources": {"web": source},
        "fetch": {"side_px": 64, "shard_pairs": 4, "attempts": 1, "retry_hours": 0, "deadline_s": 5},
        "filters": {"image_stats": {}, "text_stats": {}, "image_hash": {}},
        "reducers": {"exact_duplicates": {}, "near_duplicates": {}, "text_duplicates": {}, "text_frequency": {}},
        "keep": [
            {"column": "image_stats.shorter_side_px", "min": 24},
            {"column": "image_stats.entropy", "top_fraction": 0.9},
            {"one_per": "exact_duplicates.group"},
        ],
        "canaries": {"per_defect": 0},
        "engine": "inline",
    }


def routes() -> dict[str, Any]:
    left = {"late": LATE}

    async def late(_: web.Request) -> web.StreamResponse:
        left["late"] -= 1
        return web.Response(status=503) if left["late"] >= 0 else web.Response(body=flow.drawing(99))

    async def never(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    shown: dict[str, Any] = {f"/{i}.png": flow.drawing(i % 17) for i in range(30)}  # 17 is 0 again
    return shown | {"/late.png": late, "/never.png": never}


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scheduled]:
    """Four nightly increments; /late.png comes in the third, /never.png in none. No test changes it."""
    root = tmp_path_factory.mktemp("nights")
    with small_web(routes()) as site:
        flow.write_recipe(root / "recipe.yaml", nightly(root))
        told = Scheduled(root, site, root / "workspace")
        told.add(["/late.png", "/never.png", "/gone.png"])
        for batch in BATCHES:
            told.add([f"/{i}.png" for i in batch])
            told.run()
        yield told


@pytest.fixture
def scheduled(nights: Scheduled, tmp_path: Path) -> Iterator[Scheduled]:
    """The same in a copy, with a list of its own."""
    listed = nights.root / "web.csv"
    before = listed.read_text()
    yield replace(nights, space=flow.copied(nights.space, tmp_path / "workspace"))
    listed.write_text(before)


def rows_of(store: Store, kind: str) -> dict[str, dict[str, Any]]:
    """Every row of every table of a kind, by its folder and uid; a pair that stands twice fails."""
    found: dict[str, dict[str, Any]] = {}
    for ref in list_shards(store, kind):
        folder = "/".join(ref.folder.split("/")[:2])
        for row in store.read_table(ref.table).to_pylist():
            assert row["uid"] not in found.setdefault(folder, {}), f"{row['uid']} twice in {folder}"
            found[folder][row["uid"]] = {k: v for k, v in row.items() if not k.endswith("_offset")}
    return found


def members(store: Store, kind: str) -> dict[str, list[bytes]]:
    """The members of every living pair by uid."""
    found = {}
    for ref in list_shards(store, kind):
        shard = read_shard(store, ref)
        for row in shard.table.to_pylist():
            parts = [(row[f"{n}_offset"], row[f"{n}_size"]) for n in ("image", "text", "json") if row["status"] == "ok"]
            found[row["uid"]] = [shard.tar[at : at + size] for at, size in parts]
    return found


def files(space: Path, leave: tuple[str, ...] = (".lock",)) -> dict[str, bytes]:
    paths = (path for path in space.rglob("*") if path.is_file() and path.name not in leave)
    return {str(path.relative_to(space)): path.read_bytes() for path in paths}


def merged(scheduled: Scheduled, below: int | None = 100) -> dict[str, Any]:
    return compact(scheduled.workspace, None, below, False)


def test_every_row_and_every_byte_is_still_there(scheduled: Scheduled) -> None:
    store = scheduled.workspace.store
    kinds = ("pairs", "scores", "selections", "shards")
    before = {kind: rows_of(store, kind) for kind in kinds}
    bytes_before = {kind: members(store, kind) for kind in ("pairs", "shards")}
    told = merged(scheduled)
    assert [one["members"] for one in told["merged"]] == [["0000", "0001", "0002", "0003"]] and told["left"] == []
    assert {kind: rows_of(store, kind) for kind in kinds} == before
    assert {kind: members(store, kind) for kind in ("pairs", "shards")} == bytes_before
    assert scheduled.workspace.increments("web") == ["0000-0003"] and not store.has(MARK)
    shards = list_shards(store, "pairs")
    assert len(shards) == 6 and 0 < len(before["shards"].popitem()[1]) < 21
    keys = [key for ref in shards for key in store.read_table(ref.table)["url_key"].to_pylist()]
    assert keys == sorted(keys) and len(keys) == 21
    assert not [name for name in store.every("") if "/0001/" in name or "/0000/" in name]
    verdict = verify(scheduled.workspace)
    assert verdict.ok and not verdict.unfinished, verdict
    table = store.read_table(store.files("scores", "00000.parquet")[0])
    facts = table_metadata(table)
    assert facts["filter"] == "exact_duplicates" and facts["rows"] == str(table.num_rows) and len(facts) == 3
    assert merged(scheduled)["merged"] == [], "there is nothing left to merge"


def failed(store: Store, increment: str, why: str) -> str:
    """Lets text_stats have failed at the last pair of an increment; returns its uid."""
    path = [p for p in store.files("scores", ".parquet") if f"/{increment}/" in p and "/text_stats-" in p][-1]
    table = store.read_table(path)
    rows = table.to_pylist()
    rows[-1] = dict.fromkeys(rows[-1]) | {"uid": rows[-1]["uid"]}
    told = {"errors": {why: [len(rows) - 1]}, "nulls": dict.fromkeys(table.column_names[1:], 1)}
    new = pa.Table.from_pylist(rows, table.schema.remove_metadata())
    store.write_table(path, new, table_metadata(table) | {key: json.dumps(facts) for key, facts in told.items()})
    return str(rows[-1]["uid"])


def test_errors_and_nulls_follow_their_rows(scheduled: Scheduled) -> None:
    store = scheduled.workspace.store
    folder = next(f"scores/{name}" for name in store.folders("scores") if name.startswith("text_stats-"))
    wrong = {failed(store, increment, f"told in {increment}"): increment for increment in ("0001", "0003")}
    before = told_by_tables(store, folder, list_shards(store, "pairs"))
    assert sum(before[2].values()) == 2 == before[1]["words"]
    merged(scheduled)
    assert told_by_tables(store, folder, list_shards(store, "pairs")) == before
    errors = {
        uid: trace(scheduled.workspace, uid)["scores"][folder[7:]].get("error")
        for uid in rows_of(store, folder)[folder]
    }
    assert {uid: why for uid, why in errors.items() if why} == {u: f"told in {name}" for u, name in wrong.items()}
    forget(scheduled.workspace, {"uids": [next(iter(wrong))]}, "asked for", lambda holder: None)
    assert dict(told_by_tables(store, folder, list_shards(store, "pairs"))[2]) == {"told in 0003": 1}


def grouped(store: Store) -> dict[str, list[list[str]]]:
    """Gives each pair one of five embeddings and runs the reducer that compares them. Returns the groups that each
    reducer has made, of the first four nights and of later ones."""
    refs, clip = list_shards(store, "pairs"), "scores/clip-aaaaaaaaaaaa"
    for ref in refs:
        uids = store.read_table(ref.table, ["uid"])
        vectors = [np.eye(5, dtype=np.float16)[int(uid[:4], 16) % 5] for uid in uids["uid"].to_pylist()]
        table = uids.append_column("image", pa.array(vectors, pa.list_(pa.float16())))
        if not store.has(ref.beside(clip)):
            store.write_table(ref.beside(clip), table, {"filter": "clip"})
    run_reducers(store, {"semantic_duplicates": SemanticDuplicates(cluster_rows=8)}, {"web": refs}, {"clip": clip}, [])
    found: dict[str, list[list[str]]] = {}
    for ref in list_shards(store, "scores"):
        table = store.read_table(ref.table)
        if "group" in table.column_names:
            name = ref.folder.split("/")[1].rpartition("-")[0]
            found.setdefault(name, [[], []])[ref.increment >= "0004"] += table["group"].drop_null().to_pylist()
    return found


def test_the_next_night_is_that_of_a_workspace_that_was_never_compacted(scheduled: Scheduled, tmp_path: Path) -> None:
    grouped(scheduled.workspace.store)
    other = replace(scheduled, space=flow.copied(scheduled.space, tmp_path / "other"))
    merged(scheduled)
    scheduled.add([f"/{i}.png" for i in range(20, 26)])
    asked = []
    for one in (other, scheduled):
        scheduled.site.asked.clear()
        for _ in range(2):  # /never.png is given up after five tries
            run = one.run()
        asked.append(Counter(scheduled.site.asked))
        groups = grouped(one.workspace.store)
        assert verify(one.workspace).ok
        report = run.read("report.json")
        assert all(told["adds_up"] for told in report["rounds"]) and report["rounds"][0]["funnel"][0]["left"] > 20
    assert asked[0] == asked[1] and asked[0]["/never.png"] == 1 and asked[0]["/0.png"] == 0
    assert asked[0].total() == 7, "robots.txt is known, six are new"
    assert other.workspace.increments("web") == ["0000", "0001", "0002", "0003", "0004"]
    assert scheduled.workspace.increments("web") == ["0000-0003", "0004"]
    new = [{p: b for p, b in files(one.space).items() if "/0004/" in p} for one in (other, scheduled)]
    same = [{p: b for p, b in told.items() if not p.startswith(("ledger", "candidates"))} for told in new]
    assert same[0] == same[1] and len(same[0]) > 10
    assert set(groups) >= {"exact_duplicates", "near_duplicates", "text_duplicates", "semantic_duplicates"}
    for name, (earlier, late) in groups.items():
        assert set(late) & set(earlier), f"{name}: some join a group of what was merged"
    path = "candidates/web/0004/part-00000.parquet"
    counts = [table_metadata(one.workspace.store.read_table(path))["counts"] for one in (other, scheduled)]
    assert counts[0] == counts[1]


def test_the_last_run_is_found_done(scheduled: Scheduled) -> None:
    merged(scheduled)
    before = files(scheduled.space)
    scheduled.site.asked.clear()
    run = scheduled.run(new=False)
    assert run.reused == ["crawl", "fetch", "round-1/curate"] and scheduled.site.asked == []
    after = files(scheduled.space)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name.split("/")[0] for name in changed} == {"runs", "selections"}
    assert not [name for name in changed if name.endswith((".parquet", ".tar"))], "only facts are told anew"
    assert run.read("lineage.json")["increments"] == {"web": ["0000-0003"]}
    assert all(told["adds_up"] for told in run.read("report.json")["rounds"])


def test_what_was_tried_again_is_remembered(scheduled: Scheduled) -> None:
    merged(scheduled)
    store = scheduled.workspace.store
    ledger = {r["url_key"]: r for p in store.files("ledger", ".parquet") for r in store.read_table(p).to_pylist()}
    late, never = (url_key(scheduled.site.url(name)) for name in ("/late.png", "/never.png"))
    assert ledger[late]["status"] == "ok" and ledger[never]["status"] == "transient" and len(ledger) == 23
    (path,) = store.files("tries")
    tries = [(row["url_key"], row["increment"], row["status"]) for row in store.read_table(path).to_pylist()]
    assert [t[1:] for t in tries if t[0] == late] == [("0000", "transient"), ("0001", "transient"), ("0002", "ok")]
    assert [t[1] for t in tries if t[0] == never] == ["0000", "0001", "0002", "0003"] and len(tries) == 7
    told = trace(scheduled.workspace, ledger[late]["uid"])
    assert [row["increment"] for row in told["tries"]] == ["0000", "0001", "0002"] and told["scores"]


def merge(space: Workspace, *names: str) -> None:
    (group,) = space.store.folders("pairs")
    with space.lock():
        join(space, Merge("web", joined(names), list(names), {group: 4}, {}))


def test_merging_twice_is_merging_once(scheduled: Scheduled, tmp_path: Path) -> None:
    other = Workspace.open(flow.copied(scheduled.space, tmp_path / "other"))
    merge(other, "0000", "0001")
    merge(other, "0002", "0003")
    assert other.increments("web") == ["0000-0001", "0002-0003"] and verify(other).ok
    merge(other, "0000-0001", "0002-0003")
    merged(scheduled)
    assert files(tmp_path / "other", (".lock", "00000.parquet")) == files(scheduled.space, (".lock", "00000.parquet"))
    for one in (path for path in other.store.files("", "00000.parquet") if not path.startswith("tries")):
        assert other.store.read(one) == scheduled.workspace.store.read(one), one
    tries = [space.store.read_table(*space.store.files("tries")).to_pylist() for space in (other, scheduled.workspace)]
    one, two = (sorted((row["url_key"], row["started_at"], row["status"]) for row in told) for told in tries)
    assert one == two and len(one) == 7


def test_a_dry_run_changes_nothing(scheduled: Scheduled, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(scheduled.space)
    with scheduled.workspace.lock():
        told = flow.command(capsys, "compact", str(scheduled.space), "--below", "100", "--dry-run", "--json")
    assert told.json["merged"][0]["increment"] == "0000-0003" and told.json["dry_run"]
    assert files(scheduled.space) == before


def test_another_writer_is_told(scheduled: Scheduled, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(scheduled.space)
    with scheduled.workspace.lock():
        told = flow.command(capsys, "compact", str(scheduled.space))
    assert told.code == 2 and "the lock is held by process" in told.err and files(scheduled.space) == before
    told = flow.command(capsys, "compact", str(scheduled.space), "--source", "wep")
    assert told.code == 2 and "web" in told.err


def test_the_commands_that_look_still_see_all(scheduled: Scheduled, capsys: pytest.CaptureFixture[str]) -> None:
    told = flow.command(capsys, "compact", str(scheduled.space), "--below", "100")
    assert "merged web 0000, 0001, 0002, 0003 (21 pairs in 9 shards) into 0000-0003" in told.out
    held = flow.command(capsys, "ls", str(scheduled.space), "--json").json
    assert held["sources"] == {"web": {"increments": ["0000-0003"]}} and [
        p["rows"] for p in held["pairs"].values()
    ] == [21]
    assert all(
        run["next"].startswith("done") for run in flow.command(capsys, "status", str(scheduled.space), "--json").json
    )


def test_only_small_ones_are_merged(scheduled: Scheduled) -> None:
    told = merged(scheduled, 6)
    assert [one["members"] for one in told["merged"]] == [["0001", "0002", "0003"]]
    assert [(one["increment"], one["why"][:5]) for one in told["left"]] == [("0000", "large")]
    assert merged(replace(scheduled, space=scheduled.space), None)["merged"] == [], "all fill a shard of four"
    assert verify(scheduled.workspace).ok


def test_what_is_forgotten_keeps_its_place_and_can_be_forgotten_later(scheduled: Scheduled) -> None:
    space = scheduled.workspace
    late = url_key(scheduled.site.url("/late.png"))
    shown = (row for rows in rows_of(space.store, "shards").values() for row in rows.values())
    kept = [row["uid"] for row in shown if row["url_key"] != late]
    forget(space, {"uids": [kept[0]]}, "early", lambda holder: None)
    merged(scheduled)
    rows = next(iter(rows_of(space.store, "pairs").values()))
    assert len(rows) == 21 and rows[kept[0]]["status"] == "forgotten" and rows[kept[0]]["url"] is None
    assert verify(space).ok
    told = forget(space, {"uids": [kept[1]], "urls": [scheduled.site.url("/late.png")]}, "late", lambda holder: None)
    assert told["rewritten"]["tries"] == 3 and late in space.tombstones()["url_key"]
    verdict = verify(space)
    assert verdict.ok, verdict.problems
    everything = b"".join(data for name, data in files(scheduled.space).items() if not name.endswith((".csv", ".yaml")))
    assert scheduled.site.url("/late.png").encode() not in everything
    scheduled.add(["/20.png"])
    assert scheduled.run().read("report.json")["rounds"][0]["adds_up"] and verify(space).ok


def test_what_filters_or_runs_have_seen_in_part_stays_apart(scheduled: Scheduled) -> None:
    store = scheduled.workspace.store
    (group,) = store.folders("pairs")
    for increment in ("0000", "0001"):
        source = next(p for p in store.files("scores") if "text_stats" in p and f"/{increment}/" in p)
        folder = scheduled.space / source.rpartition("/")[0]
        shutil.copytree(folder, scheduled.space / f"scores/text_stats-000000000000/{group}/{increment}")
    told = merged(scheduled)
    assert [one["members"] for one in told["merged"]] == [["0000", "0001"], ["0002", "0003"]]
    assert verify(scheduled.workspace).ok


def test_a_damaged_tar_is_never_copied(scheduled: Scheduled) -> None:
    store = scheduled.workspace.store
    tar = scheduled.space / list_shards(store, "pairs")[2].tar
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    rows = rows_of(store, "pairs")
    with pytest.raises(PairmillError, match="another sha256"):
        merged(scheduled)
    assert rows_of(store, "pairs") == rows and [path for path, _ in verify(scheduled.workspace).problems]
    assert not [path for path in store.every("") if "0000-0003" in path] and not store.has(MARK), "it is taken back"


def another(scheduled: Scheduled, run: str, pinned: list[str], done: bool) -> None:
    """The latest run of another recipe."""
    store, folder = scheduled.workspace.store, f"runs/{run}-0001"
    lineage = json.loads(store.read(f"runs/{store.folders('runs')[-1]}/lineage.json"))
    store.write(f"{folder}/lineage.json", json.dumps(lineage | {"increments": {"web": pinned}}))
    store.write(f"{folder}/recipe.yaml", store.read(f"runs/{store.folders('runs')[0]}/recipe.yaml"))
    if done:
        store.write(f"{folder}/report.html", "done")


def test_a_run_that_may_be_gone_on_with_keeps_what_it_is_pinned_to(scheduled: Scheduled) -> None:
    another(scheduled, "other-000000000000", ["0000", "0001"], True)
    told = merged(scheduled)
    assert [one["members"] for one in told["merged"]] == [["0000", "0001"], ["0002", "0003"]]
    assert verify(scheduled.workspace).ok


def test_what_an_unfinished_run_is_at_is_left_alone(scheduled: Scheduled) -> None:
    another(scheduled, "other-000000000000", ["0000", "0001"], False)
    told = merged(scheduled)
    assert [one["members"] for one in told["merged"]] == [["0002", "0003"]]
    assert all("isn't finished" in one["why"] for one in told["left"]) and len(told["left"]) == 2


def test_each_fetch_of_a_source_is_merged_with_its_own_shards(scheduled: Scheduled, tmp_path: Path) -> None:
    values = nightly(scheduled.root)
    path = flow.write_recipe(tmp_path / "recipe.yaml", values | {"fetch": values["fetch"] | {"shard_pairs": 7}})
    run = open_run(path, workspace=str(scheduled.space), console=Console(True))
    with run.workspace.lock():
        stages.crawl(run)
        stages.fetch(run)
    assert merged(scheduled)["merged"] == [], "that run isn't finished"
    run.workspace.store.write(f"{run.folder}/report.html", "done")
    told = merged(scheduled)
    assert [one["members"] for one in told["merged"]] == [["0000", "0001", "0002", "0003"]]
    store = scheduled.workspace.store
    held = {group: len(list_shards(store, f"pairs/{group}")) for group in store.folders("pairs")}
    assert sorted(held.values()) == [4, 6] and verify(scheduled.workspace).ok, verify(scheduled.workspace).problems
    late = url_key(scheduled.site.url("/late.png"))
    mine = [
        r for p in store.files(f"ledger/{stages.shards(run)['web'][0].group}") for r in store.read_table(p).to_pylist()
    ]
    assert [row["status"] for row in mine if row["url_key"] == late] == ["ok"], "it was refused later, as had before"
    counted = {name: tries(store, "web", "0000-0003", keys_of(store), spec) for name, spec in
               {"mine": run.recipe.fetch, "nobody's": FetchSpec(side_px=99)}.items()}  # fmt: skip
    assert {name: len(told) for name, told in counted.items()} == {"mine": 5, "nobody's": 5}


def keys_of(store: Store) -> pa.ChunkedArray:
    return store.read_table("candidates/web/0000-0003/part-00000.parquet")["url_key"]


def test_a_store_in_memory_is_compacted_too(scheduled: Scheduled, memory_store: Store) -> None:
    for name, data in files(scheduled.space).items():
        memory_store.write(name, data)
    assert compact(Workspace.open(memory_store.root), None, 100, False)["merged"]
    merged(scheduled)
    assert {name: memory_store.read(name) for name in memory_store.files("")} == files(scheduled.space)


def test_a_training_on_all_of_it_is_known_by_the_new_shards(scheduled: Scheduled) -> None:
    store, run = scheduled.workspace.store, scheduled.workspace.store.folders("runs")[-1]
    refs = {name: [r for r in list_shards(store, "pairs") if r.increment <= name] for name in ("0001", "0003")}
    jobs = {name: blip(store, some) for name, some in refs.items()}
    for job in jobs.values():
        store.write(f"runs/{run}/first-filter/blip/{job.fingerprint}/config.json", job.model_dump_json())
        store.write(f"models/index/{job.fingerprint}.json", json.dumps({"fingerprint": job.fingerprint}))
    for names in (("0000", "0001"), ("0002", "0003"), ("0000-0001", "0002-0003")):
        merge(scheduled.workspace, *names)
        now = blip(store, list_shards(store, "pairs"))
        assert trained(scheduled.workspace, now.fingerprint) == {"fingerprint": jobs["0003"].fingerprint}
    aliases = [json.loads(store.read(path)) for path in store.files("models/index")]
    assert [told.get("same_as") for told in aliases].count(jobs["0001"].fingerprint) == 1, "not after the second merge"
    kept = store.read_table(f"pinned/{refs['0001'][0].table}")
    assert kept.column_names == ["uid"] and kept.num_rows


def blip(store: Store, refs: list[ShardRef]) -> BlipJob:
    tars = [table_metadata(store.read_table(ref.table))["tar_sha256"] for ref in refs]
    pins = [Pin(folder=ref.folder, index=ref.index, tar_sha256=tar) for ref, tar in zip(refs, tars, strict=True)]
    return BlipJob(store=store.root, shards=pins, out_dir="", spec=BlipSpec(**flow.BLIP))


class Killed(BaseException):
    """Ends a compaction where the test wants it."""


@contextlib.contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Iterator[list[str]]:
    """Lets so many files be published or folders be deleted, then kills."""
    done: list[str] = []

    def counted(before: Callable[..., Any]) -> Callable[..., Any]:
        def change(self: Store, *given: Any, **named: Any) -> Any:
            if len(done) == steps:
                raise Killed
            result = before(self, *given, **named)
            done.append(str(given[-1]))
            return result

        return change

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        for name in ("_publish", "delete"):
            patched.setattr(Store, name, counted(getattr(Store, name)))
        yield done


@pytest.fixture
def two_nights(scheduled: Scheduled) -> Scheduled:
    """Two increments alone may be merged, and only one reducer has seen them, so that there are few steps."""
    for folder in ("image_stats", "text_stats", "near_duplicates", "image_hash", "text_duplicates", "text_frequency"):
        for path in scheduled.space.glob(f"scores/{folder}-*"):
            shutil.rmtree(path)
    another(scheduled, "other-000000000000", ["0000", "0001"], False)
    return scheduled


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_step_it_ends_like_one_that_was_not(
    two_nights: Scheduled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, target = tmp_path / "start", two_nights.space
    shutil.copytree(target, start)
    with killed_after(monkeypatch, -1) as steps:
        merged(two_nights)
    whole, rows = files(target), rows_of(Store(target), "pairs")
    assert len(steps) > 20
    for kill in range(len(steps)):
        shutil.rmtree(target)
        shutil.copytree(start, target)
        with killed_after(monkeypatch, kill):
            merged(two_nights)
        space = two_nights.workspace
        assert rows_of(space.store, "pairs") == rows, f"each pair once, {kill} steps done"
        assert exactly(space.increments("web"), ["0000", "0001", "0002", "0003"]) and verify(space).ok, kill
        merged(two_nights)
        assert files(target) == whole, f"killed after {kill}: {steps[kill - 1]}"


SCRIPT = """
import os, signal, sys
from pairs.increments import MARK
from pairs.store import Store
from pairs.workspace import Workspace
from pipelines.compact import compact
left, publish = [int(sys.argv[2])], Store._publish
def counted(self, temporary, target):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    publish(self, temporary, target)
    if self.has(MARK) and b'"committed": true' in self.read(MARK):
        os.kill(os.getpid(), signal.SIGKILL)
Store._publish = counted
compact(Workspace.open(sys.argv[1]), None, 100, False)
"""


def test_sigkill_before_and_after_the_commit(scheduled: Scheduled, tmp_path: Path) -> None:
    start, rows = scheduled.space, rows_of(scheduled.workspace.store, "pairs")
    whole = replace(scheduled, space=flow.copied(start, tmp_path / "whole"))
    merged(whole)
    for publications in (12, 1000):
        target = replace(scheduled, space=flow.copied(start, tmp_path / str(publications)))
        command = [sys.executable, "-c", SCRIPT, str(target.space), str(publications)]
        assert subprocess.run(command, cwd=ROOT, timeout=50).returncode == -9
        assert json.loads(target.workspace.store.read(MARK))["committed"] == (publications > 12)
        assert rows_of(target.workspace.store, "pairs") == rows and verify(target.workspace).ok
        with target.workspace.lock():
            pass
        assert not target.workspace.store.has(MARK), "whoever writes next ends it"
        merged(target)
        assert files(target.space) == files(whole.space)


def test_names() -> None:
    assert (
        joined(["0000", "0001-0004"]) == "0000-0004" and following(["0000-0004"]) == "0005" and following([]) == "0000"
    )
    names = ["0000-0002", "0003", "0004-0009"]
    assert names == sorted(names)
    assert holding(names, ["0001", "0002", "0003", "0011"]) == ["0000-0002", "0003", "0011"]
    assert exactly(names, ["0000", "0001-0002", "0003"]) == ["0000-0002", "0003"]
    with pytest.raises(PairmillError, match="0001 and no others"):
        exactly(names, ["0000", "0001"])


@pytest.fixture
def drawn_later(finished: Finished) -> Iterator[Callable[[int], None]]:
    """Draws six more pictures into the trusted folder; they go after the test."""
    yield lambda first: flow.draw_folder(finished.root / "trusted", 6, first)
    for path in (finished.root / "trusted").glob("0[56]??.*"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trainings_stay_what_they_were(
    finished: Finished, drawn_later: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    nights = []
    for first in (500, 600):
        drawn_later(first)
        nights.append(flow.run_stages(finished.recipe, space, new=True)[0])
    workspace, store = Workspace.open(space), Store(space)
    new = [
        row["uid"] for rows in rows_of(store, "shards").values() for row in rows.values() if row["increment"] > "0000"
    ]
    before = {uid: trace(workspace, uid)["training"] for uid in new}
    assert len(new) > 6 and any(len(told) == 2 for told in before.values()), before
    tables = set(flow.files_below(space, "scores", "models", "canaries", "evals"))
    told = compact(workspace, None, 100, False)
    assert [(one["source"], one["members"]) for one in told["merged"]] == [("trusted", ["0001", "0002"])]
    assert verify(workspace).ok, verify(workspace).problems
    assert {uid: trace(workspace, uid)["training"] for uid in new} == before, "by what was kept of the old shards"
    again, _ = flow.run_stages(finished.recipe, space)
    assert again.folder == nights[1].folder
    assert {"first-filter", "round-1/curate", "round-1/pretrain", "round-1/evaluate"} <= set(again.reused)
    made = set(flow.files_below(space, "scores", "models", "canaries", "evals")) - tables
    assert all("/0001-0002/" in name or name.startswith("models/index/") for name in made), made
    assert len([name for name in made if name.startswith("models/")]) == 1, "the last training is known by both names"
    told = forget(workspace, {"uids": [new[0]]}, "asked", lambda holder: None)
    assert told["rewritten"]["pinned"] >= 1 and len(told["trainings"]) == len(before[new[0]])
    counts = [list(one["pairs"].values()) for one in told["trainings"]]
    assert counts == [[len(one["steps"])] for one in before[new[0]]], "how often each took it, by the kept tables"
    assert verify(workspace).ok, verify(workspace).problems
