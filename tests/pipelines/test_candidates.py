"""Increments: merged, sorted, cut once; nothing comes twice but what failed for a passing cause."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pairs.errors import PairmillError
from pairs.identity import url_key
from pairs.recipe import FetchSpec, SourceSpec
from pairs.schemas import CANDIDATES, LEDGER
from pairs.store import Store
from pairs.workspace import Workspace
from pipelines import candidates, stages
from pipelines.candidates import MAX_TRIES, CutCounts, _settings, check_settings, cut_increment, part
from pipelines.console import Console
from pipelines.run import Run, open_run
from pipelines.sources import Context, text
from tests.pipelines import flow


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "work", create=True)


def cut(workspace: Workspace, rows: list[dict[str, str]], tmp_path: Path) -> CutCounts:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"url": "url", "text": "text", "page": "page"}
    spec = SourceSpec.model_validate({"kind": "urls", "path": str(path), "columns": columns})
    return cut_increment(workspace, "table", spec, FetchSpec(), lambda done, total, note: None)


def row(url: str, text: str = "a text", page: str = "http://p.test/") -> dict[str, str]:
    return {"url": url, "text": text, "page": page}


def test_rows_of_one_image_are_merged_in_an_order_of_their_own(workspace: Workspace, tmp_path: Path) -> None:
    rows = [
        row("http://a.test/x.png?b=1&a=2", "second", "http://p.test/2"),
        row("http://A.test:80/x.png?a=2&b=1#top", "first", "http://p.test/1"),
        row("http://a.test/x.png?a=2&b=1", "  first ", "http://p.test/3"),
        row("http://a.test/y.png"),
    ]
    counts = cut(workspace, rows, tmp_path)
    assert counts == CutCounts("0000", found=4, new=2, dropped={"merged": 2})
    first = workspace.store.read(part("table", "0000"))
    table = workspace.store.read_table(part("table", "0000"))
    assert table.schema.equals(CANDIDATES, check_metadata=False)
    assert table["url_key"].to_pylist() == sorted(url_key(r["url"]) for r in rows[2:])
    merged = next(r for r in table.to_pylist() if "x.png" in r["url"])
    assert [t["text"] for t in merged["texts"]] == ["first", "second"]
    assert merged["page"] == "http://p.test/1" and merged["url"] == "http://A.test:80/x.png?a=2&b=1"
    assert merged["url_key"] == url_key("http://a.test/x.png?b=1&a=2"), "one image in three spellings"

    other = Workspace.open(tmp_path / "other", create=True)
    cut(other, rows[::-1], tmp_path)
    assert other.store.read(part("table", "0000")) == first


def test_what_is_dropped_is_counted_by_reason(workspace: Workspace, tmp_path: Path) -> None:
    bad = ["data:image/png;base64,AA", "file:///etc/passwd", "ftp://a.test/x", "", "http://", "http://[::1/x"]
    long = row("http://a.test/long", "x" * 10_001)
    counts = cut(workspace, [*map(row, bad), row("http://a.test/short"), long], tmp_path)
    assert counts.dropped == {"bad_url": 2, "data_url": 1, "scheme": 3}
    assert counts.found == counts.new + sum(counts.dropped.values())
    assert counts.texts_cut == 1


def test_a_second_cut_takes_only_what_is_new(workspace: Workspace, tmp_path: Path) -> None:
    rows = [row(f"http://a.test/{n}.png") for n in range(4)]
    cut(workspace, rows, tmp_path)
    again = cut(workspace, rows, tmp_path)
    assert again.increment is None and again.new == 0 and again.dropped == {"earlier": 4}
    assert workspace.increments("table") == ["0000"]
    workspace.bury("url_key", [url_key("http://a.test/5.png")], "asked for")
    more = cut(workspace, [*rows, row("http://a.test/4.png"), row("http://a.test/5.png")], tmp_path)
    assert (more.increment, more.new, more.dropped) == ("0001", 1, {"earlier": 4, "forgotten": 1})


def write_ledger(workspace: Workspace, increment: str, statuses: dict[str, str]) -> None:
    rows = [{"url_key": url_key(url), "status": status} for url, status in statuses.items()]
    workspace.store.write_table(
        f"ledger/table-aaaaaaaaaaaa/{increment}/00000.parquet", pa.Table.from_pylist(rows, schema=LEDGER)
    )


def test_passing_failures_come_again_until_they_succeed_or_wear_out(workspace: Workspace, tmp_path: Path) -> None:
    urls = [f"http://a.test/{name}" for name in ("ok", "gone", "busy")]
    rows = [row(url) for url in urls]
    cut(workspace, rows, tmp_path)
    write_ledger(workspace, "0000", dict(zip(urls, ("ok", "permanent", "transient"), strict=True)))
    for n in range(1, MAX_TRIES):
        counts = cut(workspace, rows, tmp_path)
        assert (counts.increment, counts.new, counts.dropped) == (f"{n:04d}", 1, {"earlier": 2})
        write_ledger(workspace, counts.increment, {urls[2]: "transient"})
    assert cut(workspace, rows, tmp_path).dropped == {"earlier": 2, "gave_up": 1}
    write_ledger(workspace, f"{MAX_TRIES - 1:04d}", {urls[2]: "ok"})
    assert cut(workspace, rows, tmp_path).dropped == {"earlier": 3}


def test_what_is_due_comes_again_though_the_source_has_it_no_longer(workspace: Workspace, tmp_path: Path) -> None:
    urls = [f"http://a.test/{name}" for name in ("ok", "busy", "gone", "dead")]
    cut(workspace, [row(url, "its own words") for url in urls], tmp_path)
    write_ledger(workspace, "0000", dict(zip(urls, ("ok", "transient", "permanent", "transient"), strict=True)))
    workspace.bury("url_key", [url_key(urls[3])], "asked for")
    later = cut(workspace, [row("http://a.test/new")], tmp_path)
    assert (later.increment, later.new, later.found, later.dropped) == ("0001", 2, 2, {})
    rows = workspace.store.read_table(part("table", "0001")).to_pylist()
    assert {r["url"]: r["texts"][0]["text"] for r in rows} == {urls[1]: "its own words", "http://a.test/new": "a text"}
    write_ledger(workspace, "0001", {urls[1]: "ok", "http://a.test/new": "ok"})
    assert cut(workspace, [row("http://a.test/new")], tmp_path).dropped == {"earlier": 1}


def test_an_empty_source_writes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="none"):
        cut(workspace, [], tmp_path)
    assert workspace.store.files("candidates") == []


def test_a_changed_source_is_not_taken_for_the_one_that_was_cut(workspace: Workspace, tmp_path: Path) -> None:
    cut(workspace, [row("http://a.test/1.png")], tmp_path)
    settings = {"kind": "urls", "path": str(tmp_path / "rows.jsonl")}
    columns = {"url": "url", "text": "text", "page": "page"}
    same = SourceSpec.model_validate(settings | {"columns": columns, "trusted": True, "allow": ["127.0.0.0/8"]})
    check_settings(workspace, "table", same)
    check_settings(workspace, "other", SourceSpec.model_validate(settings))
    changed = SourceSpec.model_validate(settings | {"columns": {"url": "text"}})
    with pytest.raises(PairmillError, match="new name") as error:
        check_settings(workspace, "table", changed)
    assert "columns" in error.value.expected and "path" not in error.value.expected
    with pytest.raises(PairmillError, match="new name"):
        cut_increment(workspace, "table", changed, FetchSpec(), lambda done, total, note: None)
    assert workspace.increments("table") == ["0000"]


def test_how_far_and_how_fast_a_site_is_crawled_may_change(workspace: Workspace) -> None:
    site = {"kind": "site", "seeds": ["http://a.test/"]}
    facts = {"settings": _settings("web", SourceSpec.model_validate(site)), "counts": "{}"}
    workspace.store.write_table(part("web", "0000"), CANDIDATES.empty_table(), facts)
    pace = {"delay_s": 0.0, "per_host": 9, "max_pages": 5, "max_depth": 1}
    check_settings(workspace, "web", SourceSpec.model_validate(site | pace))
    with pytest.raises(PairmillError, match="seeds"):
        check_settings(workspace, "web", SourceSpec.model_validate(site | {"seeds": ["http://b.test/"]}))


RECIPE = """
name: cuts
sources:
  table: {kind: urls, path: PATH}
"""


@pytest.mark.parametrize("killed_at", ["before the table", "after the table"])
def test_a_killed_search_for_news_cuts_one_increment(
    killed_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes on either side of the table; meanwhile the source has grown, so that a second cut would show."""
    table, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("PATH", str(table)))

    def crawl(count: int, new: bool) -> Run:
        table.write_text("".join(json.dumps(row(f"http://a.test/{n}.png")) + "\n" for n in range(count)))
        run = open_run(recipe, workspace=str(tmp_path / "work"), console=Console(quiet=True), new=new)
        with run.workspace.lock():
            stages.crawl(run)
        return run

    first = crawl(2, False)
    first.workspace.store.write(f"{first.folder}/report.html", "done")
    name = "delete" if killed_at == "after the table" else ""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*(Store, "delete", killed) if name else (candidates, "write_groups", killed))
        crawl(4, True)
    assert first.workspace.increments("table") == ["0000", "0001"][: 1 + (name == "delete")]
    run = crawl(6, True)
    assert run.workspace.increments("table") == ["0000", "0001"]
    told = run.read("stages.json")["crawl"]["sources"]["table"]
    assert (told["increment"], told["new"]) == ("0001", 2 if name == "delete" else 4)
    assert run.read("cut.json") == {"table": "0001"}
    assert crawl(6, True).workspace.increments("table") == ["0000", "0001"], "the run that goes on has cut already"


@dataclass(frozen=True)
class Opting:
    """Images of which some are seen twice and some opt out."""

    names: str
    opted: str = ""

    def candidates(self, context: Context) -> Iterator[dict[str, Any]]:
        for page in ("http://p.test/1", "http://p.test/2"):
            for name in self.names:
                out = "noai" if name in self.opted else None
                texts = [text(f"image {name}", "alt")]
                yield {"url": f"http://a.test/{name}", "texts": texts, "page": page, "found": "img", "opt_out": out}


def crawled(run: Run) -> dict[str, Any]:
    """What a crawl stage leaves."""
    store = run.workspace.store
    return {"cut": run.read("cut.json")} | {
        path: store.read(path) for path in (*store.files("candidates"), "tombstones.parquet")
    }


@pytest.mark.parametrize("later", [Opting("abcxy", "bcx"), Opting("abc", "bc")], ids=["new ones", "nothing new"])
def test_killed_at_any_write_a_cut_with_late_opt_outs_counts_the_same(
    later: Opting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, sources, steps = tmp_path / "recipe.yaml", [Opting("abcd")], [0, 10**9]
    recipe.write_text(RECIPE.replace("PATH", "none"))
    monkeypatch.setattr(candidates, "load_source", lambda *_: sources[0])
    monkeypatch.setattr(candidates, "_settings", lambda *_: "{}")

    def crawl(workspace: Path, new: bool) -> Run:
        run = open_run(recipe, workspace=str(workspace), console=Console(quiet=True), new=new)
        with run.workspace.lock():
            stages.crawl(run)
        return run

    def counting(step: Any) -> Any:
        def counted(*args: Any, **settings: Any) -> None:
            steps[0] += 1
            if steps[0] > steps[1]:
                raise KeyboardInterrupt
            step(*args, **settings)

        return counted

    first = crawl(tmp_path / "first", False)
    first.workspace.store.write(f"{first.folder}/report.html", "done")
    sources[0] = later
    for name in ("_publish", "delete"):
        monkeypatch.setattr(Store, name, counting(getattr(Store, name)))
    steps[:] = [0, 10**9]
    whole = crawl(Path(flow.copied(tmp_path / "first", tmp_path / "whole")), True)
    expected, count = crawled(whole), steps[0]
    assert whole.read("stages.json")["crawl"]["sources"]["table"]["buried"] == 2
    assert whole.workspace.tombstones()["url_key"] == {url_key(f"http://a.test/{name}") for name in "bc"}
    for step in range(1, count):
        space = Path(flow.copied(tmp_path / "first", tmp_path / f"killed-{step}"))
        steps[:] = [0, step]
        with pytest.raises(KeyboardInterrupt):
            crawl(space, True)
        steps[:] = [0, 10**9]
        assert crawled(crawl(space, True)) == expected, step


def killed(*args: Any, **settings: Any) -> None:
    raise KeyboardInterrupt
