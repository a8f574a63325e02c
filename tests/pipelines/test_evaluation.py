"""Evaluation of a BLIP: figures are those of a plain loop over the same models, and nothing is computed twice."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import transformers

from pairs.fingerprint import content_hash
from pairs.recipe import EvaluateSpec
from pipelines import blip_figures, evaluation, stages
from pipelines.cider import cider, mean, words
from pipelines.console import Console
from pipelines.models import publish_models
from pipelines.report import page, plots
from pipelines.run import Run, open_run
from tests.filters.weights import WEIGHTS
from tests.pipelines import flow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fetched folder of trusted pairs and, published, a captioner and a matcher of random weights."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluation")
    flow.draw_folder(root / "trusted", 120)
    for n, colour in enumerate(flow.COLOURS):
        flow.draw_folder(root / "eval" / colour, 2, 3000 + 2 * n)
    values = flow.recipe(root) | {"first_filter": {}, "filters": {}, "reducers": {}, "keep": [], "texts": {}}
    del values["sources"]["web"]
    settings = {"precision": "fp32", "weights": "previous"}
    values["filters"] = {"blip_caption": settings | {"prompt": "a box ", "captions": 2}, "blip_match": settings}
    path = flow.write_recipe(root / "recipe.yaml", values)
    made = open_run(path, workspace=str(root / "space"), console=Console(quiet=True))
    with made.workspace.lock():
        stages.crawl(made)
        stages.fetch(made)
        folders = {role: root / role for role in evaluation.FILTERS}
        for role, folder in folders.items():
            folder.mkdir()
            WEIGHTS[evaluation.FILTERS[role]](folder)
        publish_models(made.workspace, "0" * 12, folders, {})
    return made


def models(run: Run) -> dict[str, str]:
    local = run.workspace.store.local
    assert local
    return {role: content_hash(local.parent / role) for role in evaluation.FILTERS}


def known(run: Run) -> dict[str, Any]:
    return {"trusted": stages.shards(run)["trusted"]}


def test_figures_are_those_of_a_plain_loop(run: Run) -> None:
    rows = list(evaluation.held_out_rows(run, known(run)))
    found = {row["figure"]: row for row in evaluation.evaluate(run, "it", models(run), known(run))["rows"]}
    folder = run.workspace.store.local / "models" / models(run)["matcher"]  # type: ignore[operator]
    model = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()
    processor = transformers.BlipProcessor.from_pretrained(folder)
    images = [
        cv2.imdecode(np.frombuffer(data, np.uint8), 1)[..., ::-1] for data in evaluation.held_out_images(run, rows)
    ]
    texts, n = [row["text"] for _, row in rows], len(rows)
    cosine, logit = np.zeros((n, n)), np.zeros((n, n))
    with torch.inference_mode():
        for i, image in enumerate(images):
            for j, text in enumerate(texts):
                inputs = processor(images=np.ascontiguousarray(image), text=text, return_tensors="pt")
                cosine[i, j] = model(**inputs, use_itm_head=False)[0].item()
                logit[i, j] = model(**inputs)[0][0, 1].item()
    assert n <= run.recipe.evaluate.reranked, "every text is re-ranked"
    for name, scores in (("", cosine), (" reranked", cosine + logit)):
        for way, ranked in (("image to text", scores), ("text to image", scores.T)):
            first = [texts[row.argmax()] for row in ranked] if way[0] == "i" else [texts[i] for i in ranked.argmax(1)]
            right = sum(one == text for one, text in zip(first, texts, strict=True))
            assert found[f"{way} at 1{name}"]["right"] == right, (way, name)
            assert found[f"{way} at 1{name}"]["n"] == n
    assert found["zero-shot accuracy"]["n"] == 8 and found["zero-shot accuracy"]["chance"] == 0.25
    assert 0 <= found["caption CIDEr"]["value"] <= 10 and found["caption CIDEr"]["unit"] == "of 10"


def test_an_evaluation_is_kept_and_hangs_on_models_and_passes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluation.evaluate(run, "it", models(run), known(run))
    monkeypatch.setattr(evaluation, "FIGURES", {})
    again = evaluation.evaluate(run, "again", models(run), known(run))
    assert again["reused"] and [r | {"model": "it"} for r in again["rows"]] == first["rows"]
    with pytest.raises(KeyError):
        evaluation.evaluate(run, "it", {"matcher": models(run)["matcher"]}, known(run))
    settings = {
        name: one | {"prompt": "another "} for name, one in run.recipe.filters.items() if name == "blip_caption"
    }
    monkeypatch.setattr(run, "recipe", run.recipe.model_copy(update={"filters": settings}))
    with pytest.raises(KeyError):
        evaluation.evaluate(run, "it", {"captioner": models(run)["captioner"]}, known(run))


def test_no_more_pairs_are_looked_at_than_were_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    two = EvaluateSpec(pairs=2)
    monkeypatch.setattr(run, "recipe", run.recipe.model_copy(update={"evaluate": two}))
    rows = evaluation.evaluate(run, "it", models(run), known(run))["rows"]
    counts = {row["n"] for row in rows if "CIDEr" not in row["figure"] and "length" not in row["figure"]}
    assert len(list(evaluation.held_out_rows(run, known(run)))) > 2 and counts == {2}


def test_captions_are_written_behind_the_prompt_that_was_learned(run: Run, tmp_path: Path) -> None:
    assert evaluation._pass(run, "captioner", models(run)["captioner"]).prompt == "a box ", "of no training's"  # type: ignore[attr-defined]
    told = {"train_config": {"spec": {"blip": {"prompt": ""}}}, "blip_job": {"spec": {"prompt": "a photo of "}}}
    for kind, given in told.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(kind)
        record = publish_models(run.workspace, kind, {"captioner": tmp_path / kind}, {kind: given})
        learned = given["spec"].get("blip", given["spec"])["prompt"]
        assert evaluation._pass(run, "captioner", record["models"]["captioner"]).prompt == learned  # type: ignore[attr-defined]


def test_what_is_not_among_the_best_by_contrast_stays_behind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = blip_figures.match_logits

    def counted(model: Any, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return whole(model, images, ids)

    monkeypatch.setattr(blip_figures, "match_logits", counted)
    rows = list(evaluation.held_out_rows(run, known(run)))
    one = evaluation._pass(run, "matcher", models(run)["matcher"])
    asked: Any = (one, evaluation.held_out_images(run, rows), [row["text"] for _, row in rows], run.scratch)
    blip_figures.retrieval(*asked, 2)
    assert len(rows) < sum(seen) <= 4 * len(rows)
    assert not [p for p in run.scratch.iterdir() if p.name.startswith("tmp")], "patches are gone"


def test_images_that_do_not_decode_are_misses_and_have_no_caption(run: Run) -> None:
    rows = list(evaluation.held_out_rows(run, known(run)))
    images = [b"none", *list(evaluation.held_out_images(run, rows))[1:]]
    matcher, captioner = (evaluation._pass(run, role, models(run)[role]) for role in ("matcher", "captioner"))
    alone, ranked = blip_figures.retrieval(matcher, images, ["a box"] * len(rows), run.scratch, 16)  # type: ignore[arg-type]
    for found in (alone, ranked):
        assert found.unreadable == 1 and found.recalls["image_to_text_at_1"].right == len(rows) - 1
    uids = [row["uid"] for _, row in rows]
    assert blip_figures.captions(captioner, uids, images)[0] is None  # type: ignore[arg-type]


def test_cider_by_hand() -> None:
    """Three images, so a word of one reference weighs ln 3, of two ln 1.5, of all nothing."""
    assert words("A red box, isn't it?! ") == ["a", "red", "box", "isn", "t", "it"]
    right = [["a red box"], ["a blue box"], ["a green tree"]]
    rare, half = np.log(3), np.log(1.5)
    # image 0 is right; image 1 says "a box": words "a" (0) and "box" (half) of "a" (0) "blue" (rare) "box" (half)
    one_word = half * half / (half * np.hypot(rare, half))
    second = 10 * np.exp(-1 / 72) * (one_word + 0 + 0 + 0) / 4  # the bigram "a box" is in no reference
    each = [10 * 3 / 4, second, 0.0]  # three words have no 4-gram, so 7.5 is the most
    found = cider(["A red box.", "a box", None], right)
    assert found["value"] == pytest.approx(np.mean(each), abs=1e-9) and found["n"] == 3
    half_width = 1.959964 * np.std(each, ddof=1) / np.sqrt(3)
    assert found["high"] == pytest.approx(min(10, np.mean(each) + half_width)) and found["low"] == 0.0


def test_too_few_images_have_no_cider() -> None:
    assert cider(["a red box"] * 2, [["a red box"], ["a tree"]]) == {"value": None, "low": None, "high": None, "n": 2}
    assert mean([])["value"] is None and mean([3.0]) == {"value": 3.0, "low": None, "high": None, "n": 1}


def test_references_without_a_word_are_left_out_of_cider_and_counted() -> None:
    captions, right = ["a red box", "a box", "a tree"], [["a red box"], ["a blue box"], ["a green tree"]]
    more = cider([*captions, "a star", None], [*([*texts, "!"] for texts in right), [], ["…", " "]])
    assert more == cider(captions, right) and more["n"] == 3


def test_the_report_tells_units_and_what_has_no_figure(run: Run) -> None:
    rows = evaluation.evaluate(run, "it", models(run), known(run))["rows"]
    told = {row["figure"]: page._interval(row) for row in rows}
    assert told["caption CIDEr"].count(" of 10 (") == 1 and "%" not in told["caption CIDEr"]
    assert told["zero-shot accuracy"].count("%") == 1
    assert page._interval({"value": None, "unit": "of 10"}) == "–"
    assert page._interval({"unit": "words"} | mean([3.0])) == "3 words"
    nothing = {"model": "it", "chance": None, "figure": "caption CIDEr", "unit": "of 10"} | mean([])
    assert "caption CIDEr" in plots.by_round(rows) and "CIDEr" not in plots.by_round([nothing])


def test_the_first_filters_blip_has_rows_where_rounds_train_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write("round-1/curation.json", {"scorer": {"models": models(run)}})
    tuned = {"matcher": models(run)["matcher"]}

    def told(objective: str, number: int) -> set[str]:
        pretrain = run.recipe.pretrain.model_copy(update={"objective": objective})
        monkeypatch.setattr(run, "recipe", run.recipe.model_copy(update={"pretrain": pretrain}))
        rows = stages.evaluate(run, number, {f"round {number}, fine-tuned": tuned})["rows"]
        assert run.read(f"round-{number}/evaluation.json") == rows
        return {row["model"] for row in rows}

    assert told("blip", 1) == {"first filter's BLIP", "round 1, fine-tuned"}
    assert told("clip", 1) == {"round 1, fine-tuned"} and told("blip", 2) == {"round 2, fine-tuned"}
