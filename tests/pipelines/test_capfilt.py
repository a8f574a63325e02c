"""CapFilt as a recipe: rounds that pretrain a BLIP and fine-tune captioner and match filter from it."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertTokenizerFast

from filters import canaries
from filters.blip import CAPTIONS, MATCHES
from filters.engine import plan
from filters.image_stats import ImageStats
from filters.weights import TOKENIZER_FILES
from pairs.errors import PairmillError
from pairs.identity import held_out, sha256_hex
from pairs.recipe import Recipe
from pairs.schemas import SELECTION
from pairs.shard import ShardRef
from pairs.strict import strict
from pairs.workspace import Workspace
from pipelines import capfilt, curation, promotion, stages, training_jobs
from pipelines.console import Console
from pipelines.inspection import trace
from pipelines.report import page
from pipelines.run import Run, open_run
from pipelines.takedown import consumers
from tests.filters import corpus
from tests.pipelines import flow
from tests.training import blip_small
from training import blip_run, frame, launch
from training.config import TrainConfig, TrainResult
from training.tokens import bert_tokenizer

TRAIN = flow.TRAIN | {"objective": "blip", "batch_pairs": 8, "steps": 4, "blip": {"queue": 32, "start": ["beginning"]}}
del TRAIN["max_patches"]
NEW = TRAIN | {"blip": {"queue": 32}}  # from weights drawn at random
TUNE = {"steps": 3, "warmup_steps": 1}
DEAD: dict[str, list[str]] = {"uid": [], "url_key": [], "host": [], "sha256": []}
IDLE = {"report", "round-1/gates", "round-2/gates"}  # stages that have nothing to reuse


def recipe(root: Path) -> dict[str, Any]:
    """Two folders, so that nothing is fetched; `root` holds web/, trusted/ and eval/."""
    values = flow.recipe(root) | {"keep": [], "reducers": {}, "rounds": 2, "name": "capfilt"}
    values["sources"]["web"] = {"kind": "folder", "path": f"{root}/web"}
    previous = {"weights": "previous"}
    values["filters"] = {"blip_caption": previous | {"max_tokens": 12}, "blip_match": previous}
    values |= {"texts": values["texts"] | {"min": 0.4}, "gates": {"min_pairs": 0}}
    values |= {"first_filter": {"blip": flow.BLIP}, "pretrain": TRAIN, "finetune": {"captioner": TUNE, "matcher": TUNE}}
    return values | {"canaries": {"per_defect": 8, "max_fraction": 0.5, "defects": ["swapped_text"]}}


def here(config: TrainConfig, on_line: launch.OnLine) -> TrainResult:
    """Trains in this process, which has imported transformers already, and leaves what `launch` leaves."""
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    (Path(config.out_dir) / "config.json").write_text(config.model_dump_json())
    return blip_run.train_blip_rank(config, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("capfilt")
    flow.draw_folder(root / "trusted", flow.TRUSTED)
    flow.draw_folder(root / "web", 24, 1000)
    for n, colour in enumerate(flow.COLOURS):
        flow.draw_folder(root / "eval" / colour, 1, 3000 + n)
    flow.write_recipe(root / "recipe.yaml", recipe(root))
    return root


@pytest.fixture(scope="module")
def finished(drawn: Path) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "train", here)
        patch.setattr(frame, "say", lambda line: None)
        patch.setattr(promotion, "FEWEST", 1)
        yield flow.run_stages(drawn / "recipe.yaml", drawn / "workspace")[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_workspace_that_was_moved_reuses_both_rounds(
    finished: Run, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "train", lambda *_: pytest.fail("trained again"))
    moved = flow.copied(drawn / "workspace", tmp_path / "moved")
    (drawn / "workspace").rename(tmp_path / "away")
    try:
        again, _ = flow.run_stages(drawn / "recipe.yaml", moved)
        assert again.read("stages.json").keys() - {*again.reused} == IDLE
        traces = [trace(again.workspace, uid)["training"] for uid in uids(again, "web")]
        assert any(training["steps"] for told in traces for training in told), "plans are made again"
    finally:
        (tmp_path / "away").rename(drawn / "workspace")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rounds_promote_what_is_not_worse_and_say_so(finished: Run) -> None:
    told = finished.read("report.json")
    first, second = (finished.read(f"round-{n}/curation.json") for n in (1, 2))
    models = first["scorer"]["models"]
    for row in told["rounds"][0]["compared"]:
        assert row["promoted"] == (row["new"]["value"] >= row["in force"]["value"])
        assert (second["scorer"]["models"][row["role"]] != models[row["role"]]) == row["promoted"]
    assert [row["role"] for row in told["rounds"][0]["compared"]] == ["captioner", "matcher"]
    assert told["rounds"][0]["finetuning"].keys() == {"captioner", "matcher"} and not told["warnings"]
    tuned = [t["model"] for t in told["rounds"][0]["finetuning"].values()]
    assert not {*tuned} & {*told["rounds"][0]["training"]["model"].split(", ")}
    for number in (1, 2):  # each round's BLIP is new, and begins where the first filter's did
        assert capfilt.settled(finished, number).blip.start == [f"models/{models['beginning']}"]
    assert told["rounds"][0]["adds_up"] and told["rounds"][1]["adds_up"]
    page = finished.workspace.store.read(f"{finished.folder}/report.html").decode()
    assert "Fine-tuning: matcher" in page and "Noise ratio: web" in page and "match probability of captions" in page


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_captioner_is_judged_by_the_matcher_in_force_on_twins(finished: Run) -> None:
    (row, _), store = finished.read("report.json")["rounds"][0]["compared"], finished.workspace.store
    curated = finished.read("round-1/curation.json")
    ref = ShardRef(curated["canary_shards"][0], 0)
    facts = canaries.facts(store, ref)
    twins = [f["twin"] and f["half"] == "report" for f in facts.to_pylist()]
    found = []
    for folder in store.folders("scores"):
        made = store.has(f"scores/{folder}/made_with.json") and store.has(ref.beside(f"scores/{folder}"))
        if folder.startswith("blip_match-") and made:
            lists = store.read_table(ref.beside(f"scores/{folder}"))["probability"].to_pylist()
            rows = [values for values, twin in zip(lists, twins, strict=True) if twin]
            found.append(float(np.mean([np.mean([p or 0 for p in values]) if values else 0.0 for values in rows])))
    assert any(abs(row["new"]["value"] - value) < 1e-6 for value in found) and row["new"]["n"] == sum(twins)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_noise_ratios_are_shares_of_the_texts_that_were_matched(finished: Run) -> None:
    curated, store = finished.read("round-1/curation.json"), finished.workspace.store
    matched, dropped = Counter[str](), Counter[str]()
    for ref in stages.shards(finished)["web"]:
        rows = store.read_table(ref.table)["texts"].to_pylist()
        captions, scores = (
            store.read_table(ref.beside(curated["scores"][name]))[column].to_pylist()
            for name, column in (("blip_caption", "texts"), ("blip_match", "probability"))
        )
        for own, written, values in zip(rows, captions, scores, strict=True):
            kinds = ["web"] * len(own) + ["synthetic"] * len(written or [])
            matched.update(kinds)
            dropped.update(kind for kind, value in zip(kinds, values, strict=True) if value < 0.4)
    told = finished.read("report.json")["rounds"][0]["noise_ratios"]
    assert {side: figure["n"] for side, figure in told.items()} == {
        "web": matched["web"],
        "synthetic": matched["synthetic"],
    }
    assert all(figure["value"] == pytest.approx(dropped[side] / matched[side]) for side, figure in told.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_synthetic_text_leads_to_the_model_that_wrote_it(finished: Run) -> None:
    curated, store = finished.read("round-1/curation.json"), finished.workspace.store
    texts = [
        text
        for ref in stages.shards(finished)["web"]
        for row in store.read_table(ref.beside(curated["selection"])).cast(SELECTION)["texts"].to_pylist()
        for text in row
    ]
    assert {text["kind"] for text in texts} >= {"synthetic"} and all(text["probability"] >= 0.4 for text in texts)
    uid = next(iter(uids(finished, "web")))
    made = trace(finished.workspace, uid)["scores"][curated["scores"]["blip_caption"].removeprefix("scores/")]
    assert made["made_with"] == {"weights": curated["scorer"]["models"]["captioner"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_step_of_every_blip_is_accounted_for(finished: Run) -> None:
    places: dict[str, list[Any]] = {}
    apart = finished.read("round-1/curation.json")["apart"]
    trusted = uids(finished, "trusted")
    for uid in [*trusted, *uids(finished, "web")]:
        for training in trace(finished.workspace, uid)["training"]:
            name, steps = training["training"].split("/", 2)[2].rpartition("/")[0], training["steps"]
            flat = [(stage, s) for stage, row in steps.items() for s in row] if isinstance(steps, dict) else steps
            places.setdefault(name, []).extend(flat)
            assert ("canaries" in training.get("note", "")) == (uid in apart)
    assert Counter(places["round-1"]) == dict.fromkeys(range(4), 8)
    assert Counter(places["round-2/matcher"]) == Counter(places["round-1/captioner"]) == dict.fromkeys(range(3), 8)
    stages_ = {(stage, step) for stage in ("words", "captioner", "matcher") for step in range(3)}
    assert Counter(places["first-filter/blip"]) == dict.fromkeys(stages_, 8)
    told = consumers(finished.workspace, {*trusted}, DEAD)
    took = {t["training"].split("/", 2)[2].rpartition("/")[0]: sum(v or 0 for v in t["pairs"].values()) for t in told}
    assert took.keys() == places.keys() and took["round-1/matcher"] == 24


def uids(run: Run, source: str) -> list[str]:
    return [
        u for ref in stages.shards(run)[source] for u in run.workspace.store.read_table(ref.table)["uid"].to_pylist()
    ]


def test_no_twin_of_a_held_out_pair_or_a_canary_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture three times: as it is, byte for byte again, and with one other pixel."""
    flow.draw_folder(tmp_path / "web", 4, 1000)
    flow.draw_folder(tmp_path / "trusted", 30)
    picture: dict[str, Any] = {}
    for i in range(30):
        pixels = cv2.imdecode(np.frombuffer(flow.drawing(i), np.uint8), cv2.IMREAD_COLOR)
        pixels[0, 0] ^= 1
        for name, data in {"bytes": flow.drawing(i), "near": cv2.imencode(".png", pixels)[1].tobytes()}.items():
            picture[sha256_hex(data)] = i
            (tmp_path / f"trusted/{i:04d}{name}.png").write_bytes(data)
            (tmp_path / f"trusted/{i:04d}{name}.txt").write_text(flow.caption(i))
    values = recipe(tmp_path) | {"filters": {"image_hash": {}}, "reducers": {"near_duplicates": {}}, "texts": {}}
    values |= {"keep": [{"one_per": "near_duplicates.group"}]}
    path = flow.write_recipe(tmp_path / "recipe.yaml", values)
    run = open_run(path, workspace=str(tmp_path / "workspace"), console=Console(quiet=True))
    jobs: dict[str, Any] = {}
    models = dict.fromkeys(("beginning", "captioner", "matcher"), "0" * 64)
    done = {"models": models, "reused": False, "result": {"steps": 0}, "fingerprint": ""}
    monkeypatch.setattr(training_jobs, "_record", lambda run, name, job, *_: jobs.update({name: job}) or done)
    stages.crawl(run)
    stages.fetch(run)
    picked = stages.curate(run, 1, stages.first_filter(run))
    stages.finetune(run, 1, picked, {"models": models})
    store, trusted = run.workspace.store, stages.shards(run)["trusted"]
    rows = {row["uid"]: row for ref in trusted for row in store.read_table(ref.table).to_pylist()}
    planted = [ShardRef(folder, 0) for folder in picked["canary_shards"]]
    unseen = [row for uid, row in rows.items() if held_out(uid) or uid in canaries.set_apart(store, planted)]
    assert 8 < len(unseen) < 30 and len(rows) == 90
    group = {row["sha256"]: row["sha256"] for row in rows.values()}  # before round 1 equal bytes alone are known
    for name in ("first-filter/blip", "round-1/captioner", "round-1/matcher"):
        read = {u for pin in jobs[name].shards for u in store.read_table(pin.ref.table, ["uid"])["uid"].to_pylist()}
        seen = {group[rows[uid]["sha256"]] for uid in read - {*jobs[name].apart}}
        assert seen and not seen & {group[row["sha256"]] for row in unseen}, name
        group = picture


WEB: dict[str, Any] = {"sources": {"web": {"kind": "folder", "path": "web"}}}


def captioned(**settings: Any) -> dict[str, Any]:
    return {"filters": {"blip_caption": {"weights": "previous"} | settings, "blip_match": {"weights": "previous"}}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (WEB | {"first_filter": {}, "filters": {}, "texts": {}}, "to fine-tune"),
        (WEB | {"finetune": None}, "to train the first filter on"),
        ({"pretrain": NEW | {"model": flow.MODEL | {"tokenizer": "web"}}}, "tokenizer.json or vocab.txt"),
        ({"pretrain": TRAIN | {"blip": {"start": ["./web"]}}}, "no config.json, model.safetensors, tokenizer.json"),
        ({"filters": {"blip_match": {"weights": "./web", "of": ["texts"]}}, "texts": {}}, "with its tokenizer"),
        ({"first_filter": {}, "filters": {}, "texts": {}}, "whose beginning pretrain.blip.start names"),
        ({"first_filter": {}, "filters": {}, "texts": {}, "pretrain": NEW}, "no first_filter.blip"),
        ({"pretrain": flow.TRAIN}, "pretrain.objective is blip"),
        (
            {"pretrain": flow.TRAIN | {"model": {"tokenizer": "previous"}}, "finetune": None},
            "goes with objective: blip",
        ),
        ({"first_filter": {"clip": TRAIN | {"blip": {"start": ["./web"]}}}}, "first_filter.clip trains a CLIP"),
        (
            {"pretrain": TRAIN | {"workers": 4}, "finetune": {"matcher": {"batch_pairs": 2}}},
            "finetune.matcher: Value error, batch_pairs 2",
        ),
        ({"pretrain": TRAIN | {"model": flow.MODEL | {"embed_dim": 24}}}, "16) and 70 positions in ['beginning']"),
        ({"pretrain": TRAIN | {"model": flow.MODEL | {"tokenizer": "web"}}}, "no pretrain.model.tokenizer beside"),
        (
            {"pretrain": TRAIN | {"blip": {"start": ["beginning"], "match_mark": "[ENC]"}}},
            "begins its texts with [CLS]",
        ),
        ({"filters": {"blip_match": {"weights": "web/none", "of": ["texts"]}}, "texts": {}}, "no such folder"),
        ({"filters": {"clip": {"weights": "openia"}}, "texts": {}}, "did you mean 'openai'?"),
        (
            captioned(max_tokens=68) | {"pretrain": flow.TRAIN, "finetune": None},
            "70 text positions of the first filter",
        ),
        (captioned(max_tokens=61, prompt="a-b, c " * 2), "found 10 tokens of the prompt, 61 of the text"),
        (
            captioned(max_tokens=62) | {"pretrain": NEW},
            "64 text positions of the BLIP of pretrain, at filters.blip_cap",
        ),
        ({"pretrain": NEW | {"blip": {"prompt": "a long " * 32}}}, "found 64 tokens of the prompt, 2 of the text"),
    ],
)
def test_what_a_blip_lacks_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("trusted", "eval", "web"):
        flow.draw_folder(tmp_path / kind, 1)
    path = flow.write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path) | changes)
    with pytest.raises(PairmillError) as error:
        stages.check(open_run(path, workspace=str(tmp_path / "workspace"), console=Console(quiet=True)).recipe)
    assert told in str(error.value)


def test_a_start_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    def check(**changes: Any) -> None:
        pretrain = TRAIN | {"blip": {"start": [str(tmp_path)], "match_mark": "[ENC]"}, "model": model | changes}
        capfilt.check(strict(Recipe, values | {"pretrain": pretrain}, "recipe"))

    blip_small.folder(tmp_path, CAPTIONS, plain=True)
    values = recipe(tmp_path) | captioned(max_tokens=12)
    values["filters"]["blip_match"] = {"weights": "a/b@1", "max_tokens": 24}
    model = flow.MODEL | {"vision": flow.TOWER | {"layers": 2}, "text": {"layers": 3, "width": 48, "heads": 4}}
    check()
    with pytest.raises(PairmillError, match="24 positions"):
        check(context=25)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace(": 38", ": 5"))
    with pytest.raises(PairmillError, match="5 begins a text"):
        check()
    with pytest.raises(PairmillError, match=r"\[ENC\] in the tokenizer"):
        BertTokenizerFast(vocab={"[UNK]": 0, "[DEC]": 1}, bos_token="[DEC]").save_pretrained(tmp_path / "lacking")
        words = {"model": {"tokenizer": str(tmp_path / "lacking")}, "blip": {"match_mark": "[ENC]"}}
        capfilt.check(strict(Recipe, values | {"pretrain": TRAIN | words}, "recipe"))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace(": 5", ": 38"))
    values["filters"]["blip_caption"] |= {"prompt": "a red box ", "max_tokens": 22}
    with pytest.raises(PairmillError, match=r"(?s)24 text positions .*blip_caption.* 3 tokens of the prompt, 22 "):
        check()


def test_a_shared_training_is_warned_of(tmp_path: Path) -> None:
    def warned(**changes: Any) -> list[str]:
        return capfilt.warnings(strict(Recipe, recipe(tmp_path) | changes, "recipe"))

    def named(caption: str, match: str) -> dict[str, Any]:
        return {"blip_caption": {"weights": caption}, "blip_match": {"weights": match}}

    assert warned() == [] and warned(filters=named("a/b@1", "a/c@1")) == []
    assert "of one training" in warned(finetune=None)[0] and "confirmation bias" in warned(finetune=None)[0]
    for role, config in (("captioner", "a"), ("matcher", "a"), ("tuned", "b"), ("foreign", None)):
        (tmp_path / role).mkdir()
        if config:
            (tmp_path / role / "model_card.json").write_text(json.dumps({"config": config}))
    captioner, matcher, tuned, foreign = (str(tmp_path / role) for role in ("captioner", "matcher", "tuned", "foreign"))
    assert f"{captioner} and {matcher}, are of one training" in warned(filters=named(captioner, matcher))[0]
    assert not warned(filters=named(captioner, tuned)) and not warned(filters=named(foreign, foreign))


def test_tokenizers_are_known_by_content(tmp_path: Path) -> None:
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}" if name != "other" else "{ }")
        (tmp_path / name / "model.safetensors").write_text(name)
        (tmp_path / name / ".cache").mkdir()
    space = Workspace.open(tmp_path / "space", create=True)
    one, two, other = (capfilt.publish_folder(space, tmp_path / n, TOKENIZER_FILES) for n in ("one", "two", "other"))
    assert one == two != other and [p.name for p in (tmp_path / "space" / one).iterdir()] == ["tokenizer.json"]
    shutil.rmtree(tmp_path / "one")
    assert (Path(space.store.root) / one / "tokenizer.json").exists()


def test_without_a_first_filter_the_tokenizer_is_the_published_captioners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, kind in {"captioner": CAPTIONS, "matcher": MATCHES}.items():
        blip_small.folder(tmp_path / f"hub/models--owner--{name}/snapshots/{'0' * 40}", kind)
    named = {
        n: {"weights": f"owner/{w}@{'0' * 40}"}
        for n, w in {"blip_caption": "captioner", "blip_match": "matcher"}.items()
    }
    values = recipe(tmp_path) | {"first_filter": {}, "pretrain": NEW, "filters": named}
    flow.draw_folder(tmp_path / "eval", 1)
    run = open_run(flow.write_recipe(tmp_path / "recipe.yaml", values), workspace=str(tmp_path / "workspace"))
    stages.check(run.recipe)
    folder = Path(run.workspace.store.root) / capfilt.settled(run, 1).model.tokenizer
    assert len(bert_tokenizer(str(folder))) == blip_small.SIZES.vocabulary
    assert folder.parent.name == "models" and "model.safetensors" not in [path.name for path in folder.iterdir()]
    named["blip_match"] = named["blip_caption"]
    with pytest.raises(PairmillError, match=r"a model of .'BlipForConditionalGeneration'"):
        stages.check(strict(Recipe, values, "recipe"))


def test_a_silent_captioner_is_told_and_stopped_by_a_gate(tmp_path: Path) -> None:
    """Of this run's untrusted pairs: captions of trusted pairs, of canaries and of other runs' shards tell nothing."""
    run = open_run(flow.write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path)), workspace=str(tmp_path / "workspace"))
    written, store = {"blip_caption": corpus.folder("blip_caption")}, run.workspace.store

    def add_captions(source: str, increment: str, rows: list[Any]) -> ShardRef:
        made = {"texts": pa.array([t for t, _ in rows], pa.list_(pa.string())), "reason": [why for _, why in rows]}
        return corpus.add(run.workspace, source, increment, range(len(rows)), {"blip_caption": made})

    web = add_captions("web", "0000", [(None, "endless"), (None, "endless"), (["a box"], "empty"), (None, "empty")])
    add_captions("web", "0001", [(["a box"], None)])
    shards = {"web": [web], "trusted": [add_captions("clean", "0000", [(["a box"], None)])]}
    told = curation.captions(run, shards, written)
    assert told and told["without"] == {"endless": 2, "empty": 1} and (told["pairs"], told["share"]) == (4, 0.25)
    picked = {"kept_untrusted": 0, "captions": told}
    stages.gates(run, 1, picked)
    words = "captions for 25.0% of 4 untrusted pairs (none: endless 2, empty 1)"
    assert run.read("stages.json")["round-1/gates"]["note"] == words
    run.recipe = strict(Recipe, recipe(tmp_path) | {"gates": {"min_pairs": 0, "min_captions": 0.3}}, "recipe")
    with pytest.raises(PairmillError, match=r"25\.0% of 4") as error:
        stages.gates(run, 1, picked)
    assert "gates.min_captions" in str(error.value)
    run.workspace.bury("uid", store.read_table(web.table)["uid"].to_pylist()[:2], "asked")
    assert curation.captions(run, shards, written)["share"] == 0.5  # type: ignore[index]
    assert curation.captions(run, {}, written) is curation.captions(run, shards, {}) is None


@pytest.mark.parametrize(
    ("new", "old", "n", "moves"),
    [(0.5, 0.5, 20, True), (0.4, 0.5, 20, False), (0.0, 0.0, 20, True), (None, None, 0, False), (1.0, 0.0, 19, False)],
)
def test_what_is_not_worse_is_promoted(
    monkeypatch: pytest.MonkeyPatch, new: float | None, old: float | None, n: int, moves: bool
) -> None:
    monkeypatch.setattr(promotion, "FEWEST", 20)  # `finished` has only a few canaries
    verdict = promotion._verdict("matcher", {"value": new, "n": n}, {"value": old, "n": n})
    assert verdict["promoted"] == moves and ("too few" in verdict["told"]) == (n < 20)


def test_one_captioned_twin_gives_no_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(flow.write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path)), workspace=str(tmp_path / "workspace"))
    ref, planned = ShardRef("canaries/swapped_text-0/0000", 0), plan({"image_stats": ImageStats()})[0]
    run.workspace.store.write_table(ref.beside(planned.folder), pa.table({"probability": [[0.4, 0.6], [0.5]]}))
    monkeypatch.setattr(canaries, "facts", lambda *_: pa.table({"half": ["report"] * 2, "twin": [True, False]}))
    told = promotion._figure(run, "captioner", planned, ref)
    assert told == {"value": 0.5, "low": None, "high": None, "n": 1} and page._interval(told) == "50.0 %"
