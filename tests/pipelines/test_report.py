"""The report: its counts add up, what strangers wrote stays text, and it loads nothing from anywhere."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipelines import stages
from pipelines.console import Console
from pipelines.report import plots
from pipelines.report.gather import adds_up, all_read, funnel_rows
from pipelines.report.page import render
from pipelines.run import open_run
from tests.pipelines import flow
from tests.pipelines.conftest import Finished

pytestmark = pytest.mark.timeout(400)
HOSTILE = "'\"></text></svg></style><script>alert(1)</script><img src=x onerror=alert(2)>"
LOADING = {"src", "href", "xlink:href", "action", "data", "srcset", "poster", "background", "formaction"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_harmless(html: str) -> None:
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject", "audio", "video"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in LOADING & set(attributes):
            assert attributes[name].startswith(("data:image/jpeg;base64,", "#")), (tag, name, attributes[name][:80])
        assert "url(" not in attributes.get("style", "").replace("url(#", "")
    assert not re.search(r"url\(\s*['\"]?(?!#)", html) and "@import" not in html
    policies = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def page_of(finished: Finished) -> str:
    return (finished.workspace / finished.run.folder / "report.html").read_text()


def test_the_counts_add_up_from_candidates_to_training(finished: Finished) -> None:
    (told,) = finished.report["rounds"]
    rows = told["funnel"]
    assert told["adds_up"]
    assert rows[0] == {"step": "candidates", "dropped": None, "would_drop": None} | {
        "left": flow.WEB + len(flow.TEXTS) + flow.TRUSTED
    }
    assert rows[0]["left"] - sum(row["dropped"] or 0 for row in rows) == rows[-1]["left"]
    left = rows[0]["left"]
    for row in rows:
        left -= row["dropped"] or 0
        assert row["left"] == left, row["step"]
    by_name = {row["step"]: row["dropped"] for row in rows}
    assert by_name["fetch permanent/http_404"] == 1 and by_name["fetch permanent/not_an_image"] == 1
    assert by_name["image_stats.shorter_side_px min 24.0"] == 1 and by_name["text_stats.words min 2.0"] == 1
    assert rows[-1]["left"] == told["training"]["pairs"]


def test_a_lost_pair_shows() -> None:
    total = {"candidates": 10, "fetch": {"pair": 8, "permanent/http_404": 2}, "pairs": 8, "kept": 5}
    total |= {"rules": [{"name": "a", "dropped": 3, "would_drop": 3, "left": 5}]}
    assert adds_up(total, 5) and not adds_up(total, 4)
    assert not adds_up(total | {"candidates": 11}, 5) and not adds_up(total | {"kept": 6}, 6)
    assert [row["left"] for row in funnel_rows(total, 5)] == [10, 8, 8, 5, 5]
    assert adds_up(total, 3, 2) and not adds_up(total, 5, 2)
    read = {"result": {"pairs": 2, "left_out": {"canary": 2, "forgotten": 1}}}
    assert all_read(None, total, 2) and all_read(read, total, 2)
    gone = {"result": {"pairs": 3, "left_out": {"canary": 2, "forgotten": 1}}}
    assert all_read(gone, total, 2) and not all_read(gone, total | {"kept": 7}, 2)
    assert not all_read(read, total, 1) and not all_read({"result": {"pairs": 2, "left_out": {"canary": 2}}}, total, 2)
    assert [row["left"] for row in funnel_rows(total, 3, 2)] == [10, 8, 8, 5, 3, 3]


def test_the_page_shows_the_same_numbers(finished: Finished) -> None:
    text = " ".join(Page(page_of(finished)).text.split())
    assert "The counts add up from candidates to training examples." in text
    for row in finished.report["rounds"][0]["funnel"]:
        assert row["step"] in text
    assert finished.run.folder in text and "zero-shot accuracy" in text


def test_each_filter_tells_its_speed_its_nulls_and_its_errors(finished: Finished) -> None:
    (told,) = finished.report["rounds"]
    rows = {row["filter"]: row for row in told["filters"]}
    total = next(row["left"] for row in told["funnel"] if row["step"] == "pairs")
    assert {row["pairs"] for row in rows.values()} == {total}
    assert all(row["pairs_per_s"] > 0 for row in rows.values())
    assert not any(row["error"] for row in rows.values())
    assert "pairs/s a worker" in page_of(finished)


def test_the_page_loads_nothing_and_runs_nothing(finished: Finished) -> None:
    assert_harmless(page_of(finished))


def test_texts_of_strangers_stay_text(finished: Finished) -> None:
    shown = {t["text"] for card in finished.report["rounds"][0]["captions"] for t in card["texts"]}
    shown |= {
        s["text"] for rule in finished.report["rounds"][0]["samples"] for k in ("dropped", "kept") for s in rule[k]
    }
    assert len(shown) > 10, "the report shows texts"
    poisoned = render(poison(finished.report))
    assert_harmless(poisoned)
    assert poisoned.count("&lt;script&gt;") > 50, "every text came through, as text"


def poison(value: Any, name: str = "") -> Any:
    """The report with something hostile in place of every text in it, thumbnails included."""
    if isinstance(value, dict):
        return {key: poison(entry, key) for key, entry in value.items()}
    if isinstance(value, list):
        return [poison(entry, name) for entry in value]
    if not isinstance(value, str):
        return value
    return value + HOSTILE if name == "image" else HOSTILE


def test_a_rule_with_the_signs_of_a_formula_is_drawn() -> None:
    names = ["text_stats.words equals $x^$", "a_$_b", "<&>"]
    drawn = plots.funnel([{"step": name, "left": 1} for name in names])
    assert "$x^$" in drawn and "&lt;&amp;&gt;" in drawn
    facts = {"column": "$\\frac$", "edges": [0, 1], "counts": [3], "trusted_counts": [0], "thresholds": [0.5]}
    assert "frac" in plots.histogram(facts)


def test_thumbnails_are_the_pictures(finished: Finished) -> None:
    cards = [card for rule in finished.report["rounds"][0]["samples"] for card in rule["dropped"] + rule["kept"]]
    assert len({card["uid"] for card in cards}) > 8
    for card in cards[:10]:
        data = base64.b64decode(card["image"].removeprefix("data:image/jpeg;base64,"))
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None and max(pixels.shape) <= 118


def test_samples_stand_on_their_side_of_the_threshold(finished: Finished) -> None:
    (told,) = finished.report["rounds"]
    rules = {entry["rule"]: entry for entry in told["samples"]}
    words = rules["text_stats.words min 2.0"]
    assert [card["text"] for card in words["dropped"]] == ["box"]
    assert all(card["value"] >= 2 for card in words["kept"])
    (limit,) = [t["threshold"] for t in told["thresholds"]]
    cosine = rules["clip.cosine top_fraction 0.8"]
    assert cosine["dropped"] and all(card["value"] < limit for card in cosine["dropped"])
    assert all(card["value"] >= limit - 1e-4 for card in cosine["kept"])


def test_histograms_count_every_scored_pair(finished: Finished) -> None:
    (told,) = finished.report["rounds"]
    pairs = next(row["left"] for row in told["funnel"] if row["step"] == "pairs")
    for entry in told["histograms"]:
        if entry["column"] != "blip_match.probability":
            assert sum(entry["counts"]) + sum(entry["trusted_counts"]) == pairs, entry["column"]
            assert sum(entry["trusted_counts"]) == flow.TRUSTED


def test_captions_of_the_web_and_of_the_model_stand_side_by_side(finished: Finished) -> None:
    (told,) = finished.report["rounds"]
    counts, web = told["caption_counts"], flow.WEB + 6
    store, folder = finished.run.workspace.store, finished.run.read("round-1/curation.json")["scores"]["blip_caption"]
    tables = [store.read_table(path, ["texts"]) for path in store.files(folder, ".parquet") if "/web-" in path]
    made = sum(len(texts or []) for table in tables for texts in table["texts"].to_pylist())
    assert counts["web"] == web and counts["synthetic"] == made > 0
    assert 0 <= counts["web_kept"] <= counts["web"] and 0 <= counts["synthetic_kept"] <= counts["synthetic"]
    kinds = {t["kind"] for card in told["captions"] for t in card["texts"]}
    assert kinds == {"alt", "synthetic"}


def test_captions_that_nothing_matched_are_no_hindrance(finished: Finished, tmp_path: Path) -> None:
    """A recipe may match the web's texts alone, and make captions all the same."""
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    values = flow.recipe(finished.root)
    values["filters"]["blip_match"]["of"] = ["texts"]
    values["texts"] = {"from": ["texts"], "match": "blip_match.probability", "min": 0.01}
    run = open_run(flow.write_recipe(tmp_path / "recipe.yaml", values), workspace=str(space), console=Console(True))
    with run.workspace.lock():
        stages.crawl(run)
        stages.fetch(run)
        stages.curate(run, 1, stages.first_filter(run))
        stages.report(run)
    (told,) = run.read("report.json")["rounds"]
    assert told["caption_counts"]["web"] == flow.WEB + 6 and told["caption_counts"]["synthetic"] == 0


def test_what_is_quarantined_is_never_shown(finished: Finished, tmp_path: Path) -> None:
    """Not even for another rule that was the first to drop it; the others' pictures stay."""
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    values = flow.recipe(finished.root)
    words = next(rule for rule in values["keep"] if rule.get("column") == "text_stats.words")
    words["quarantine"] = True
    values["keep"].insert(0, {"column": "text_stats.chars", "min": 5})
    run = open_run(flow.write_recipe(tmp_path / "recipe.yaml", values), workspace=str(space), console=Console(True))
    with run.workspace.lock():
        stages.crawl(run)
        stages.fetch(run)
        stages.curate(run, 1, stages.first_filter(run))
        stages.report(run)
    (told,) = run.read("report.json")["rounds"]
    rules = {entry["rule"]: entry for entry in told["samples"]}
    assert [(card["text"], card["image"]) for card in rules["text_stats.chars min 5.0"]["dropped"]] == [("box", None)]
    cards = [card for entry in told["samples"] for key in ("dropped", "kept", "nearest") for card in entry[key]]
    assert len(cards) > 20 and {bool(card["image"]) for card in cards if card["text"] != "box"} == {True}
    assert {card["image"] for card in cards if card["text"] == "box"} == {None}
    assert "box" not in [text["text"] for card in told["captions"] for text in card["texts"] if text["kind"] == "alt"]


def test_the_loss_curve_has_every_step(finished: Finished) -> None:
    training = finished.report["rounds"][0]["training"]
    assert [step for step, _ in training["loss"]] == list(range(6)) == list(range(training["steps"]))
    assert all(0 < loss < 20 for _, loss in training["loss"])
