"""blip_caption: transformers' own captions (greedy, beams), nucleus samples that hang on the uid alone in any
precision, what has no caption."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipProcessor

from filters import blip, blip_caption
from filters.base import Batch, fingerprint_of
from filters.blip_caption import BlipCaption
from filters.blip_search import LIKELIEST, nucleus
from filters.lookup import load_filter
from pairs.errors import PairmillError
from tests.filters.weights import WEIGHTS

UIDS = [f"{i:032x}" for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(WEIGHTS["blip_caption"](tmp_path_factory.mktemp("caption"))["weights"])


def images() -> list[Any]:
    return [np.random.default_rng(i).integers(0, 255, (40, 56, 3), np.uint8) for i in range(6)]


def captions(one: BlipCaption, rows: list[int]) -> list[Any]:
    return list(one.score(Batch([UIDS[i] for i in rows], {}, [images()[i] for i in rows]))["texts"])


@pytest.mark.parametrize(
    "asked",
    [
        {"sample": "greedy"},
        {"sample": "beam"},
        {"sample": "beam", "beams": 4, "captions": 3},
        {"sample": "beam", "beams": 5, "captions": 5, "length_penalty": 2.0},
        {"sample": "beam", "beams": 3, "captions": 2, "early_stopping": True},
    ],
    ids=lambda asked: " ".join(map(str, asked.values())),
)
def test_captions_are_those_of_transformers(
    folder: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(blip_caption.TEXTS, "cpu", 3)  # beams in 2 to 4 slots, taken again when one image is done
    one = BlipCaption(weights=folder, prompt="a box ", min_tokens=2, max_tokens=40, precision="fp32", **asked)
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    found, end = captions(one, list(range(6))), model.config.text_config.sep_token_id
    told = {"num_beams": one.beams, "num_return_sequences": one.captions, "length_penalty": one.length_penalty}
    told |= {"early_stopping": one.early_stopping}
    assert any(found)
    for image, texts in zip(images(), found, strict=True):
        inputs = processor(images=image, text="a box ", return_tensors="pt")
        beams = told if one.sample == "beam" else {}
        rows = model.generate(**inputs, do_sample=False, max_new_tokens=40, min_new_tokens=2, **beams)
        new = [row for row in rows[:, inputs["input_ids"].shape[1] - 1 :] if end in row]
        assert (texts or []) == [processor.decode(row, skip_special_tokens=True) for row in new]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("asked", [{}, {"captions": 3}, {"sample": "beam"}, {"sample": "greedy"}], ids=str)
def test_a_caption_hangs_on_its_image_uid_and_seed_alone(
    folder: str, asked: dict[str, Any], precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = BlipCaption(weights=folder, max_tokens=60, precision=precision, **asked)
    together = one.beams if one.sample == "beam" else one.captions
    monkeypatch.setitem(blip_caption.TEXTS, "cpu", (together + 1) // 2)  # two slots or more: they follow one another
    monkeypatch.setitem(blip.PATCHES, "cpu", 64)  # three images at a time
    together = captions(one, list(range(6)))
    assert [captions(one, [i])[0] for i in (5, 2)] == [together[5], together[2]]
    assert captions(one, [4, 0, 1, 3]) == [together[4], together[0], together[1], together[3]]
    if one.sample == "nucleus":
        assert all(len(texts) == one.captions for texts in together if texts)
        assert captions(BlipCaption(weights=folder, max_tokens=60, seed=1, **asked), list(range(6))) != together


def test_captions_of_one_image_differ_and_the_first_is_that_of_one_alone(folder: str) -> None:
    several = captions(BlipCaption(weights=folder, max_tokens=60, captions=4, precision="fp32"), list(range(6)))
    assert [row[:1] for row in several] == captions(
        BlipCaption(weights=folder, max_tokens=60, precision="fp32"), [*range(6)]
    )
    assert all(len(set(row)) > 1 for row in several)


def test_a_nucleus_holds_the_likeliest_of_top_p() -> None:
    chance = torch.log(torch.tensor([[0.05, 0.5, 0.3, 0.15]])).repeat(3000, 1)
    draws = torch.rand(3000, generator=torch.manual_seed(0))
    share = torch.bincount(nucleus(chance, 0.7, draws), minlength=4) / 3000
    assert share[0] == share[3] == 0 and share[1].item() == pytest.approx(0.625, abs=0.03)
    wide = torch.zeros(3, 3 * LIKELIEST).log_softmax(-1)  # no few tokens hold half of it: all are sorted
    assert nucleus(wide, 0.5, torch.tensor([0.0, 0.5, 0.999])).tolist() == [
        0,
        3 * LIKELIEST // 4,
        3 * LIKELIEST // 2 - 1,
    ]


def test_the_precision_is_part_of_the_fingerprint_and_auto_is_one_of_them(folder: str) -> None:
    named = {p: BlipCaption(weights=folder, precision=p) for p in ("auto", "bf16", "fp32")}  # type: ignore[arg-type]
    prints = {p: fingerprint_of("blip_caption", one, {}) for p, one in named.items()}
    assert prints["bf16"] != prints["fp32"] and named["auto"].dtype in ("bf16", "fp32")
    assert prints["auto"] == prints[named["auto"].dtype]


@pytest.mark.parametrize(
    "asked",
    [{"captions": 0}, {"sample": "greedy", "captions": 2}, {"sample": "beam", "captions": 4}, {"min_tokens": 31}],
)
def test_settings_that_contradict_each_other_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(PairmillError, match="captions"):
        BlipCaption(**asked)


@pytest.mark.parametrize(
    "asked",
    [{"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0, "min_tokens": 0}, {"beams": 0}, {"length_penalty": float("nan")}],
    ids=str,
)
def test_settings_out_of_range_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(PairmillError, match=rf"filters\.blip_caption\.{next(iter(asked))}: "):
        load_filter("blip_caption", asked)


def test_a_prompt_beyond_the_captioners_places_is_refused(folder: str) -> None:
    with pytest.raises(PairmillError, match="places"):
        captions(BlipCaption(weights=folder, prompt="a long box " * 30), [0])


def test_weights_in_a_pickle_alone_are_refused_with_advice(folder: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PairmillError, match=r"(?s)model\.safetensors.*save_pretrained"):
        BlipCaption(weights=str(tmp_path)).content_hashes()


def test_what_has_no_caption_is_null_and_says_why(folder: str) -> None:
    batch = Batch(UIDS[:2], {}, [None, images()[1]])
    found = BlipCaption(weights=folder, min_tokens=5, max_tokens=5).score(batch)
    assert found["texts"] == [None, None] and found["reason"] == ["undecodable", "endless"]
    found = BlipCaption(weights=folder, min_tokens=0, max_tokens=60).score(Batch(UIDS, {}, images()))
    for texts, reason in zip(found["texts"], found["reason"], strict=True):
        assert (texts is None) == (reason is not None) and texts != [""]
