"""The small BLIP: what its losses see, training that resumes to the byte, models that transformers alone loads."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BlipForConditionalGeneration

from pairs.errors import PairmillError
from pairs.identity import held_out
from pairs.pretrain import BlipSpec, TowerSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import table_metadata
from pairs.workspace import Workspace
from tests.training.small import COLOURS, encoded, pair, picture
from training import launch
from training.blip import blip_config, train_blip
from training.blip_data import jitter, load_pairs, make_tokenizer, same_text, trusted_pairs, vary
from training.blip_losses import Lesson, caption_loss, hard_negatives, pieces_held
from training.config import BlipJob, Pin

TOWER = TowerSpec(layers=1, width=32, heads=2)
SPEC = BlipSpec(
    image_px=32, vision=TOWER, text=TOWER, embed_dim=16, vocabulary=200, word_steps=6, caption_steps=5, match_steps=5,
    batch_pairs=8, checkpoint_every=2,
)  # fmt: skip
PAIRS_ = [(encoded(picture(i)), f"a {list(COLOURS)[i % 4]} box number {i % 6}") for i in range(24)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ignore(line: dict[str, object]) -> None:
    pass


def lesson(count: int = 8) -> Lesson:
    data = load_pairs(PAIRS_[:count], SPEC.image_px)
    tokenizer = make_tokenizer([*data.texts, SPEC.prompt], SPEC.vocabulary, SPEC.max_tokens)
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    return Lesson(data, tokenizer, SPEC, zero, one, pieces_held(data.texts, tokenizer))


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["words", "captioner", "matcher"])
def test_a_training_that_is_killed_in_any_stage_ends_in_the_same_bytes(tmp_path: Path, stage: str) -> None:
    lines: list[object] = []

    def stop(line: dict[str, object]) -> None:
        lines.append((line["stage"], line["step"]))
        if (line["stage"], line["step"]) == (stage, 3):
            raise Stop

    def note(line: dict[str, object]) -> None:
        lines.append((line["stage"], line["step"]))

    whole = train_blip(PAIRS_, SPEC, tmp_path / "whole", ignore)
    with pytest.raises(Stop):
        train_blip(PAIRS_, SPEC, tmp_path / "broken", stop)
    broken = train_blip(PAIRS_, SPEC, tmp_path / "broken", note)
    assert lines.count(("words", 1)) == 1, "nothing before the last checkpoint is done twice"
    for a, b in ((whole.captioner, broken.captioner), (whole.matcher, broken.matcher)):
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert not (tmp_path / "broken" / "checkpoints").exists()
    before = len(lines)
    assert train_blip(PAIRS_, SPEC, tmp_path / "broken", note) == broken and len(lines) == before, "no step more"


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    def weights(seed: int) -> bytes:
        spec = SPEC.model_copy(update={"seed": seed})
        return (train_blip(PAIRS_, spec, tmp_path, ignore).matcher / "model.safetensors").read_bytes()

    assert weights(0) != weights(1)


def test_captioner_and_matcher_are_two_models(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    models = train_blip(PAIRS_, SPEC, tmp_path, ignore)
    captioner, matcher = (load_file(folder / "model.safetensors") for folder in (models.captioner, models.matcher))
    shared = [name for name in matcher if name.startswith("vision_model") and name in captioner]
    assert shared and not any(torch.equal(captioner[n], matcher[n]) for n in shared if captioner[n].ndim > 1)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_transformers_alone_loads_and_runs_both(tmp_path: Path) -> None:
    models = train_blip(PAIRS_, SPEC, tmp_path, ignore)
    code = """
import sys, numpy as np, transformers as t
image = np.zeros((40, 30, 3), np.uint8)
for folder, cls in zip(sys.argv[1:], (t.BlipForConditionalGeneration, t.BlipForImageTextRetrieval)):
    model, processor = cls.from_pretrained(folder), t.BlipProcessor.from_pretrained(folder)
    inputs = processor(images=image, text="a red box", return_tensors="pt")
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "[CLS] a red box [SEP]", inputs
    print(model.generate(**inputs).shape if hasattr(model, "generate") else model(**inputs).itm_score.shape)
assert not any(name.split(".")[0] in ("pairs", "training", "filters") for name in sys.modules)
"""
    command = [sys.executable, "-c", code, str(models.captioner), str(models.matcher)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2])" in done.stdout


def test_the_caption_loss_is_transformers_own_after_the_prompt() -> None:
    it, rng = lesson(), np.random.default_rng(0)
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(blip_config(SPEC, it.tokenizer)).eval()
    found = caption_loss(model, it, np.array([3]), rng)["lm"]
    ids = it.tokenizer(SPEC.prompt + it.pairs.texts[3], return_tensors="pt")["input_ids"]
    ids[0, 0] = it.tokenizer.bos_token_id
    pixels = it.pictures(np.array([3]), np.random.default_rng(0))
    logits = model(pixel_values=pixels, input_ids=ids).logits[0, 3:-1]  # [DEC] a picture of | the caption [SEP]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 4:], label_smoothing=0.1)
    assert it.tokenizer.decode(ids[0, 4:]) == it.pairs.texts[3] + " [SEP]"
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_hard_negatives_are_the_similar_ones_and_never_an_equal_text() -> None:
    same = same_text(["a red box", "A red  box.", "a blue box", "a green box"])
    assert same.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [3, 3]]
    logits = torch.tensor([[9.0, 9.0, 4.0, 0.0]] * 4)
    drawn = [hard_negatives(logits, same, 1, np.random.default_rng(seed))[0].item() for seed in range(200)]
    assert set(drawn) <= {2, 3} and Counter(drawn)[2] > 150
    assert hard_negatives(logits, same, 9, np.random.default_rng(0)).shape == (4, 2)
    assert hard_negatives(logits[:2, :2], same[:2, :2], 3, np.random.default_rng(0)).shape == (2, 0)


def test_a_varied_text_keeps_the_order_of_its_words() -> None:
    text = "a red boat to the left of a small star"
    varied = [vary(text, np.random.default_rng(seed)) for seed in range(200)]
    for words in ([w for w in v.split() if w in text.split()] for v in varied):
        rest = iter(text.split())
        assert all(word in rest for word in words)
    assert 10 < sum(v == text for v in varied) < 150


def test_jitter_neither_mirrors_nor_tints() -> None:
    left = torch.full((64, 3, 32, 32), 200, dtype=torch.uint8)
    left[:, :, 12:20, 4:10] = torch.tensor([250, 0, 10], dtype=torch.uint8).view(3, 1, 1)
    moved = jitter(left, np.random.default_rng(0))
    red = (moved[:, 0] - moved[:, 1]) > 0.9
    column = (red * torch.arange(32.0)).sum((1, 2)) / red.sum((1, 2))
    assert red.any(2).any(1).all() and (column < 16).all() and column.std() > 1


def test_damaged_images_and_empty_texts_are_counted() -> None:
    data = load_pairs([*PAIRS_[:4], (b"no image", "a box"), (PAIRS_[0][0], "  ")], 32)
    assert len(data) == 4 and data.left_out == {"undecodable": 1, "no_text": 1}
    assert data.pixels.shape == (4, 3, 32, 32)
    with pytest.raises(PairmillError, match="trusted"):
        load_pairs([(b"no image", "a box")], 32)


def test_words_that_no_trusted_text_has_are_one_unknown_piece() -> None:
    tokenizer = make_tokenizer(["a red Box", "a box"], 100, 35)
    assert tokenizer.tokenize("my RED box") == ["[UNK]", "red", "box"]
    assert tokenizer.bos_token == "[DEC]" and tokenizer.convert_tokens_to_ids("[ENC]") == 6
    small = make_tokenizer(["a red box", "a box"], 9, 35)  # room for two words beside the special pieces: the frequent
    assert small.tokenize("a red box") == ["a", "[UNK]", "box"]


def shard(workspace: Workspace, count: int = 24) -> Pin:
    ref, rows = ShardRef("pairs/trusted-0123456789ab/0000", 0), []
    for i in range(count):
        row, data = pair(i)
        fields: dict[str, Any] = {name: row.get(name) for name in PAIRS.names} | {"status": "ok"}
        rows.append((fields, data))
    write_shard(workspace.store, ref, rows, PAIRS)
    sha = table_metadata(workspace.store.read_table(ref.table))["tar_sha256"]
    return Pin(folder=ref.folder, index=0, tar_sha256=sha)


def test_held_out_and_forgotten_pairs_are_never_read(workspace: Workspace) -> None:
    pin, counts = shard(workspace, 60), Counter[str]()
    job = BlipJob(store=workspace.store.root, shards=[pin], spec=SPEC, out_dir="")
    uids = [pair(i)[0]["uid"] for i in range(60)]
    kept = [uid for uid in uids if not held_out(uid)]
    assert 0 < len(kept) < 60
    workspace.bury("uid", kept[:2], "asked")
    read = list(trusted_pairs(job, counts))
    assert counts["forgotten"] == 2 and counts["read"] == len(kept) - 2 == len(read)
    apart = list(trusted_pairs(job.model_copy(update={"apart": kept[2:5]}), counts))
    by_uid = zip(sorted(kept[2:]), read, strict=True)
    assert counts["canary"] == 3 and apart == [entry for uid, entry in by_uid if uid not in kept[2:5]]
    expected = sorted((uid, i) for i, uid in enumerate(uids) if uid in kept[2:])
    assert [text for _, text in read] == [pair(i)[0]["text"] for _, i in expected]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_job_runs_in_a_process_of_its_own_and_resumes(workspace: Workspace, tmp_path: Path) -> None:
    job = BlipJob(store=workspace.store.root, shards=[shard(workspace)], spec=SPEC, out_dir=str(tmp_path / "blip"))

    def stop(line: dict[str, Any]) -> None:
        if line["stage"] == "captioner":
            raise Stop

    with pytest.raises(Stop):
        launch.train_blip(job, stop)
    lines: list[dict[str, Any]] = []
    result = launch.train_blip(job, lines.append)
    steps: dict[str, list[int]] = {}
    for line in lines:
        steps.setdefault(line["stage"], []).append(line["step"])
    assert steps.keys() == {"captioner", "matcher"}, "the shared beginning was done"
    for name, total in (("captioner", SPEC.caption_steps), ("matcher", SPEC.match_steps)):  # beside each other
        assert steps[name] == list(range(steps[name][0], total)), "each step once, in order, to the end"
    assert result.captioner.is_dir() and result.matcher.is_dir() and result.pairs > 10
    empty = job.model_copy(update={"shards": [], "out_dir": str(tmp_path / "none")})
    with pytest.raises(PairmillError, match="trusted pairs"):
        launch.train_blip(empty)
