"""A BLIP through the plan, the loader and the loop: it resumes to the byte, learns, and is fine-tuned in two parts."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import BertTokenizerFast

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.pretrain import MedSpec, PretrainSpec, TowerSpec
from pairs.recipe import Recipe
from pairs.store import Store
from tests.training.blip_small import SIZES, folder, processor, theirs
from tests.training.small import MODEL, config
from training import blip_run, frame, launch
from training.blip_data import make_tokenizer
from training.blip_export import CAPTIONER, MATCHER
from training.blip_run import build, train_blip_rank
from training.config import TrainConfig, TrainResult
from training.data import Loader
from training.models.blip import PackedBlip
from training.tables import make_plan

torch.set_num_threads(1)
WORDS = "a red green blue yellow box at the left right top bottom number of the drawings"


class Stop(Exception):
    pass


def blip(root: Path, out: str, med: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    make_tokenizer([WORDS], 64, 16).save_pretrained(root / "words")
    model = MODEL.model_copy(update={"tokenizer": str(root / "words"), "embed_dim": 16})
    settings = MedSpec(queue=40, momentum=0.9, **(med or {}))
    own = {"objective": "blip", "model": model, "blip": settings, "max_patches": 64, "steps": 6}
    return config(root, out, **own | changes)


def train(cfg: TrainConfig) -> TrainResult:
    return train_blip_rank(cfg, 0, 1, torch.device("cpu"))


def lines(cfg: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(cfg.out_dir) / "metrics.jsonl").read_text().splitlines()]


def test_whoever_makes_the_plan_again_finds_its_steps(tmp_path: Path) -> None:
    cfg = blip(tmp_path, "one", steps=4)
    train(cfg)
    plan, _ = make_plan(Store(cfg.store), cfg.shards, cfg.spec)
    assert [line["uids_sha256"] for line in lines(cfg)] == [plan.digest(step) for step in range(4)]
    small = cfg.spec.model_copy(update={"model": cfg.spec.model.model_copy(update={"vocabulary": 1})})
    assert make_plan(Store(cfg.store), cfg.shards, small), "a BLIP's vocabulary is its tokenizer's"
    aspects = dataclasses.replace(plan, square=False)
    assert aspects.digest(0) != plan.digest(0), "the images aren't square"


def test_the_pairs_of_a_step_are_known_without_a_wait_for_the_device(tmp_path: Path) -> None:
    cfg, store = blip(tmp_path, "one"), Store(tmp_path)
    plan, _ = make_plan(store, cfg.shards, cfg.spec)
    work = blip_run._begin(cfg.spec, store, plan, 0, 1, torch.device("cpu"))
    batch = Loader(plan, store, 0, 1, work.cost, MODEL.patch_px, 0.0).load(0)
    assert isinstance(work.teach, blip_run.Bootstrapping)
    here, there = (work.teach.pairs(b, 0) for b in (batch, batch.to(torch.device("meta"))))  # where nothing can be read
    assert batch.to(torch.device("meta")).parts[0][0].pool.is_meta
    assert here.spans == there.spans and torch.equal(here.same_G2, there.same_G2) and there.valid_B.all()


def test_a_run_that_is_killed_ends_in_the_same_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (blip(tmp_path, name) for name in ("whole", "broken"))
    expected = train(whole)

    def stop(line: dict[str, Any]) -> None:
        if line.get("step") == 4:
            raise Stop

    monkeypatch.setattr(frame, "say", stop)
    with pytest.raises(Stop):
        train(broken)
    monkeypatch.setattr(frame, "say", lambda line: None)
    found = train(broken)
    assert found.resumed_from == 3 and found.models.keys() == {"captioner", "matcher"}
    for role, made in expected.models.items():
        assert content_hash(made) == content_hash(found.models[role])
    assert launch.train(broken) == found, "what is done is not done again"
    assert [line["step"] for line in lines(broken)] == list(range(6))
    assert found.fill is None and all(line["fill"] is line["flops_per_s"] is None for line in lines(broken))


def test_a_start_that_was_made_anew_is_trained_on_anew(tmp_path: Path) -> None:
    first = train(blip(tmp_path, "first", steps=1))
    cfg = blip(tmp_path, "tuned", {"losses": ["lm"], "start": [str(first.models["captioner"])]}, steps=2)
    done = train(cfg)
    assert launch._finished(cfg) == done
    with pytest.raises(PairmillError, match="embed_dim"):
        wide = cfg.spec.model.model_copy(update={"embed_dim": 24})
        train(cfg.model_copy(update={"spec": cfg.spec.model_copy(update={"model": wide})}))
    train(blip(tmp_path, "first", steps=1, seed=1))
    assert launch._finished(cfg) is None
    shutil.rmtree(done.model)  # as if it had been killed before the end
    assert list((Path(cfg.out_dir) / "checkpoints").iterdir())
    assert train(cfg).resumed_from == 0, "checkpoints that began elsewhere are not gone on from"


def test_a_published_blip_whose_tokenizer_lacks_its_marks_gets_them(tmp_path: Path) -> None:
    start = [str(folder(tmp_path / kind, kind, plain=True)) for kind in (CAPTIONER, MATCHER)]
    text = TowerSpec(layers=3, width=48, heads=4)
    model = MODEL.model_copy(update={"tokenizer": start[0], "embed_dim": 16, "text": text})
    cfg = blip(tmp_path, "on", {"start": start, "match_mark": "[ENC]"}, model=model, steps=1)
    for made in train(cfg).models.values():
        tokenizer = BertTokenizerFast.from_pretrained(made)
        assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [38, 39] and tokenizer.bos_token_id == 38
        assert json.loads((made / "config.json").read_text())["text_config"]["bos_token_id"] == 38
    new, words = build(blip(tmp_path, "new", model=model).spec, Store(tmp_path))
    assert new.sizes.vocabulary == 40 and words.tokenizer.bos_token_id == 38
    theirs(CAPTIONER).save_pretrained(start[0])  # whose texts begin with piece 5
    with pytest.raises(PairmillError, match=r"5 begins a text .* the tokenizer's \[DEC\] is 38 of 40"):
        build(cfg.spec, Store(tmp_path))


def test_an_unknown_mark_is_refused(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, bos_token="[DEC]")
    tokenizer.save_pretrained(tmp_path / "lacking")
    model = MODEL.model_copy(update={"tokenizer": str(tmp_path / "lacking"), "embed_dim": 16})
    with pytest.raises(PairmillError, match=r"\[ENC\] in the tokenizer"):
        train(blip(tmp_path, "lacks", {"match_mark": "[ENC]"}, model=model, steps=1))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_tell_the_losses_of_one(tmp_path: Path, parallel: str) -> None:
    one, two = blip(tmp_path, "one", workers=1), blip(tmp_path, "two", workers=2, parallel=parallel)
    train(one)
    launch.train(two)
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a["uids_sha256"] == b["uids_sha256"] and a["pairs"] == b["pairs"]
        assert all(abs(a[name] - b[name]) < 1e-3 for name in ("itc", "itm", "lm")), (a, b)


def _scale(rank: int, cfg: TrainConfig, folder: str) -> None:
    """A rank that leaves its logit scale in a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    whole = frame.whole_state

    def state(module: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
        torch.save(dict(module.named_parameters())["logit_scale"].detach().clone(), f"{folder}/scale{rank}.pt")
        return whole(module, keep)

    frame.whole_state = state  # type: ignore[attr-defined]
    train_blip_rank(cfg, rank, 2, torch.device("cpu"))
    dist.barrier()
    os._exit(0)  # the interpreter's end may meet gloo's threads (SIGABRT), after all is done


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_cut_over_ranks_the_logit_scale_is_one(tmp_path: Path) -> None:
    cfg = blip(tmp_path, "cut", workers=2, parallel="fsdp")
    mp.start_processes(_scale, (cfg, str(tmp_path)), nprocs=2, start_method="spawn")
    one, other = (torch.load(tmp_path / f"scale{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, other) and one != PackedBlip(SIZES).logit_scale


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_it_learns_and_captioner_and_matcher_are_fine_tuned_apart(tmp_path: Path) -> None:
    first = blip(tmp_path, "first", steps=60, learning_rate=1e-3, jitter=0.0)
    made = train(first)
    told = lines(first)
    assert told[-1]["lm"] < told[0]["lm"] - 1
    assert told[-1]["itc"] < told[4]["itc"] - 0.5, "the ring is full after step 3"
    start = [str(folder) for folder in made.models.values()]
    captioner = blip(tmp_path, "captioner", {"losses": ["lm"], "start": start, "prompt": "a picture of "})
    matcher = blip(tmp_path, "matcher", {"losses": ["itc", "itm"], "start": start})
    tuned = train(captioner).models | train(matcher).models
    assert tuned.keys() == {"captioner", "matcher"}
    assert "lm" in lines(captioner)[0] and "itm" not in lines(captioner)[0] and "lm" not in lines(matcher)[0]
    assert lines(captioner)[0]["lm"] < told[0]["lm"] - 0.5, "it goes on from what was learned"
    before, after = (load_file(folder["captioner"] / "model.safetensors") for folder in (made.models, tuned))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("vision_model" in name for name in moved) and any("crossattention" in name for name in moved)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path / "bare")
    with pytest.raises(PairmillError, match="BlipForConditionalGeneration"):
        train(blip(tmp_path, "bare", {"start": [str(tmp_path / "bare")]}))
    with pytest.raises(PairmillError, match="BERT tokenizer"):
        model = MODEL.model_copy(update={"tokenizer": str(tmp_path / "nothing")})
        train(blip(tmp_path, "none", model=model))
    with pytest.raises(ValueError, match="whose wrong texts itc draws"):
        MedSpec(losses=["itm"])
    with pytest.raises(ValueError, match="BERT tokenizer"):
        PretrainSpec(objective="blip")
    with pytest.raises(ValueError, match="`blip` go with objective: blip"):
        PretrainSpec(blip={"queue": 9})
    towers = {"image": {"weights": "there", "lock": True}}
    spec = {"objective": "blip", "blip": {"start": ["folder"]}}
    PretrainSpec.model_validate_json(PretrainSpec(**spec).model_dump_json())
    for name, value in (("ema", 0.9), ("max_patches", 9), ("towers", towers)):
        with pytest.raises(ValueError, match=f"knows no {name}"):
            PretrainSpec(**spec, **{name: value})
    for name, value in (("kind", "siglip"), ("positions", "factorised"), ("logit_scale", 1.0), ("vocabulary", 9)):
        siglip = {"embed_dim": 128, "logit_bias": -1.0} if name == "kind" else {}
        with pytest.raises(ValueError, match=rf"knows no model\.{name}"):
            PretrainSpec(**spec, model={name: value, **siglip})
    with pytest.raises(ValueError, match=r"first_filter\.clip trains a CLIP"):
        first = {"clip": blip(tmp_path, "round").spec}
        Recipe(name="a", sources={"b": {"kind": "folder", "path": "c"}}, first_filter=first)
