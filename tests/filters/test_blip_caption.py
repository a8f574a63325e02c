"""blip_caption: transformers' own greedy caption, nucleus samples that hang on the uid alone, what has no caption."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipProcessor

from filters.base import Batch
from filters.blip_caption import BlipCaption
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


def test_greedy_captions_are_those_of_transformers(folder: str) -> None:
    one = BlipCaption(weights=folder, sample="greedy", prompt="a box ", min_tokens=2, max_tokens=40)
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    found = captions(one, list(range(6)))
    assert any(found)
    for image, texts in zip(images(), found, strict=True):
        inputs = processor(images=image, text="a box ", return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=40, min_new_tokens=2)[0]
        new = ids[inputs["input_ids"].shape[1] - 1 :]
        ended = model.config.text_config.sep_token_id in new.tolist()
        assert texts == ([processor.decode(new, skip_special_tokens=True)] if ended else None)


def test_a_sampled_caption_hangs_on_uid_and_seed_alone(folder: str) -> None:
    one = BlipCaption(weights=folder, max_tokens=60)
    together = captions(one, list(range(6)))
    assert [captions(one, [i])[0] for i in (5, 2)] == [together[5], together[2]]
    assert captions(one, [4, 0, 1]) == [together[4], together[0], together[1]]
    assert captions(BlipCaption(weights=folder, max_tokens=60, seed=1), list(range(6))) != together


def test_nucleus_draws_from_the_likeliest_that_hold_top_p() -> None:
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.3, 0.15]])).repeat(3000, 1)
    uids = [str(i) for i in range(3000)]
    drawn = BlipCaption(top_p=0.7, min_tokens=0).choose(logits.clone(), uids, 0, end=0)
    share = torch.bincount(drawn, minlength=4) / 3000
    assert share[0] == share[3] == 0 and share[1].item() == pytest.approx(0.625, abs=0.03)
    first = BlipCaption(top_p=0.01, min_tokens=1).choose(logits[:1].clone(), ["u"], 0, end=1)
    assert first.tolist() == [2]  # the end, though likeliest, may not come yet


def test_what_has_no_caption_is_null_and_says_why(folder: str) -> None:
    batch = Batch(UIDS[:2], {}, [None, images()[1]])
    found = BlipCaption(weights=folder, min_tokens=5, max_tokens=5).score(batch)
    assert found["texts"] == [None, None] and found["reason"] == ["undecodable", "endless"]
    found = BlipCaption(weights=folder, min_tokens=0, max_tokens=60).score(Batch(UIDS, {}, images()))
    for texts, reason in zip(found["texts"], found["reason"], strict=True):
        assert (texts is None) == (reason is not None) and texts != [""]
