"""The packed BLIP against transformers' own classes on the same weights, and its folders, both ways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pairs.errors import PairmillError
from tests.training.blip_small import SIZES, TEXTS, folder, ids, packed, padded, pixels, processor, theirs, tiny
from training.blip_export import CAPTIONER, MATCHER, load, save
from training.models.blip import PackedBlip, spans_of, stream

torch.set_num_threads(1)
CPU = torch.device("cpu")
close = {"rtol": 0.0, "atol": 1e-5}


def loaded(tmp_path: Path, architecture: str) -> tuple[PackedBlip, torch.nn.Module]:
    model, _ = load(folder(tmp_path / architecture, architecture), backend="sdpa")
    return model, theirs(architecture)


@torch.no_grad()
def test_image_states_and_contrast_are_transformers_own(tmp_path: Path) -> None:
    ours, them = loaded(tmp_path, MATCHER)
    pictures, images = pixels(6), packed(pixels(6))
    states = ours.visual(images)
    expected = them.vision_model(pictures).last_hidden_state
    torch.testing.assert_close(torch.stack([states[a : a + n] for a, n in spans_of(images)]), expected, **close)
    cosines = ours.image_features(states, images) @ ours.text_features(stream(ids(TEXTS), CPU)).T
    told = them(**padded(TEXTS), pixel_values=pictures, use_itm_head=False).itm_score
    torch.testing.assert_close(cosines, told, **close)
    assert told.std() > 0.02, "cosines that differ"


@torch.no_grad()
def test_match_logits_of_any_image_and_text_are_transformers_own(tmp_path: Path) -> None:
    ours, them = loaded(tmp_path, MATCHER)
    pictures, images = pixels(3), packed(pixels(3))
    states, spans, looks = ours.visual(images), spans_of(images), [2, 0, 1, 1, 0, 2]
    streams = [stream(ids(TEXTS), CPU, [spans[i] for i in looks])]
    logits = ours.matches(ours.text(streams, states)[0], streams[0])
    torch.testing.assert_close(logits, them(**padded(TEXTS), pixel_values=pictures[looks]).itm_score, **close)
    assert logits.std() > 0.02


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_captions_loss_is_transformers_own(tmp_path: Path, smoothing: float) -> None:
    ours, _ = loaded(tmp_path, CAPTIONER)
    them = theirs(CAPTIONER, label_smoothing=smoothing)
    pictures, images, batch = pixels(6), packed(pixels(6)), padded(TEXTS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    told = them(**batch, pixel_values=pictures, labels=labels)
    whole = ids(TEXTS)
    written = stream([text[:-1] for text in whole], CPU, spans_of(images), causal=True)
    logits = ours.words(ours.text([written], ours.visual(images))[0])
    targets = torch.empty(len(logits), dtype=torch.int64)
    for first, text, row in zip(written.first.tolist(), whole, told.logits, strict=True):
        targets[first : first + len(text) - 1] = text[1:]
        torch.testing.assert_close(logits[first : first + len(text) - 1], row[: len(text) - 1], **close)
    found = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(found, told.loss, **close)


def test_all_streams_at_once_are_each_alone_and_no_text_sees_another() -> None:
    model = tiny().double()
    images = packed(pixels(6).double())
    states, spans = model.visual(images), spans_of(images)
    read, write = stream(ids(TEXTS), CPU, spans), stream(ids(TEXTS[:3]), CPU, spans[:3], causal=True)
    both = model.text([read, write], states)
    for found, one in zip(both, (read, write), strict=True):
        torch.testing.assert_close(found, model.text([one], states)[0])
        for i, first in enumerate(one.first.tolist()):
            alone = stream([ids(TEXTS)[i]], CPU, [spans[i]], causal=one is write)
            torch.testing.assert_close(
                found[first : first + len(alone.tokens)], model.text([alone], states)[0], rtol=1e-10, atol=1e-12
            )


def test_encoder_and_decoder_share_all_but_self_attention(tmp_path: Path) -> None:
    model = tiny()
    for architecture in (CAPTIONER, MATCHER):
        save(tmp_path / architecture, SIZES, model.state_dict(), architecture, processor(), {"card.json": "{}"})
    caption, match = (load_file(tmp_path / name / "model.safetensors") for name in (CAPTIONER, MATCHER))
    pairs = {n: n.replace("text_encoder.", "text_decoder.bert.") for n in match if n.startswith("text_encoder.")}
    apart = {n for n, other in pairs.items() if match[n].ndim > 1 and not torch.equal(match[n], caption[other])}
    assert apart == {n for n in pairs if ".attention." in n and match[n].ndim > 1} and apart
    assert json.loads((tmp_path / MATCHER / "config.json").read_text())["architectures"] == [MATCHER]


def test_both_folders_together_give_the_model_back_and_one_copies_its_twin(tmp_path: Path) -> None:
    model = tiny()
    paths = [tmp_path / name for name in (CAPTIONER, MATCHER)]
    for path in paths:
        save(path, SIZES, model.state_dict(), path.name, processor(), {})
    again, found = load(*paths)
    given = model.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, given[name]) or name == "logit_scale", name
    assert found.tokenizer("a red box")["input_ids"] == processor().tokenizer("a red box")["input_ids"]
    alone = load(paths[0])[0].state_dict()
    assert torch.equal(alone["text.layers.1.read.in_proj_weight"], given["text.layers.1.write.in_proj_weight"])
    assert not torch.equal(alone["match_head.weight"], given["match_head.weight"]), "a captioner has none"


def test_a_folder_without_a_tokenizer_or_of_another_kind_is_named(tmp_path: Path) -> None:
    theirs(MATCHER).save_pretrained(tmp_path / "bare")
    with pytest.raises(PairmillError, match="tokenizer"):
        load(tmp_path / "bare")
    path = folder(tmp_path / "other", MATCHER)
    config = json.loads((path / "config.json").read_text()) | {"architectures": ["BlipForQuestionAnswering"]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PairmillError, match="BlipForQuestionAnswering"):
        load(path)


@pytest.mark.slow
def test_transformers_alone_loads_both_in_a_process_of_its_own(tmp_path: Path) -> None:
    model, images = tiny(), packed(pixels(1))
    for architecture in (CAPTIONER, MATCHER):
        save(tmp_path / architecture, SIZES, model.state_dict(), architecture, processor(), {})
    torch.save(pixels(1), tmp_path / "pixels.pt")
    code = """
import sys, torch, transformers as t
pixels = torch.load(sys.argv[1] + "/pixels.pt")
caption, match = (getattr(t, n).from_pretrained(f"{sys.argv[1]}/{n}").eval() for n in sys.argv[2:])
processor = t.BlipProcessor.from_pretrained(f"{sys.argv[1]}/{sys.argv[2]}")
text = processor.tokenizer("a red box", return_tensors="pt")["input_ids"]
print(match(text, pixels).itm_score.tolist(), caption.generate(pixels, max_new_tokens=4).shape)
assert not any(name.split(".")[0] in ("pairs", "training", "filters") for name in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path), CAPTIONER, MATCHER]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        look = stream(ids(["a red box"]), CPU, spans_of(images))
        logits = model.matches(model.text([look], model.visual(images))[0], look)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.split(" torch.Size")[0])), logits, **close)


def test_another_grid_than_the_models_own_is_taken() -> None:
    from training.packing import pack_images

    model = tiny()
    images = pack_images([torch.randn(n, 192) for n in (6, 16)], [(2, 3), (4, 4)])
    assert model.visual(images).shape == (7 + 17, SIZES.vision[1])
