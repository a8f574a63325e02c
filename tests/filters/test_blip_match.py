"""blip_match: transformers' own figures, in the order of the texts, whatever else is in the batch."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import BlipForImageTextRetrieval, BlipProcessor

from filters.base import Batch
from filters.blip import MATCHES
from filters.blip_match import BlipMatch
from filters.lookup import load_filter
from filters.measure import FilterStats, measure
from filters.weights import blip_hashes
from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from tests.filters.weights import WEIGHTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(WEIGHTS["blip_match"](tmp_path_factory.mktemp("match"))["weights"])


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 56, 3), np.uint8)


def batch(rows: list[tuple[list[str] | None, list[str] | None]], pixels: list[Any] | None = None) -> Batch:
    texts = [None if web is None else [{"text": t, "kind": "alt", "language": None} for t in web] for web, _ in rows]
    columns = {"texts": texts, "blip_caption.texts": [made for _, made in rows]}
    return Batch([f"{i:032x}" for i in range(len(rows))], columns, pixels or [image(i) for i in range(len(rows))])


ROWS: list[tuple[list[str] | None, list[str] | None]] = [
    (["a red box", "the long text of another page"], ["box"]),
    (["boat"], None),
    (["", "star"], [""]),
    (None, ["a green house by a lake"]),
]


def test_figures_are_those_of_transformers(folder: str) -> None:
    found = BlipMatch(weights=folder, precision="fp32").score(batch(ROWS))
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    inputs = processor(images=image(0), text="the long text of another page", return_tensors="pt")
    with torch.no_grad():
        probability = model(**inputs).itm_score.softmax(1)[0, 1].item()
        cosine = model(**inputs, use_itm_head=False).itm_score[0, 0].item()
    assert found["probability"][0][1] == pytest.approx(probability, abs=1e-5)
    assert found["cosine"][0][1] == pytest.approx(cosine, abs=1e-5)


def test_lists_follow_the_texts_of_the_page_then_the_caption(folder: str) -> None:
    found = BlipMatch(weights=folder).score(batch(ROWS))
    assert [len(row) for row in found["probability"]] == [3, 1, 3, 1]
    assert [[p is None for p in row] for row in found["cosine"]] == [[False] * 3, [False], [True, False, True], [False]]
    only = BlipMatch(weights=folder, of=("blip_caption.texts",)).score(batch(ROWS))
    assert only["probability"][0][0] == pytest.approx(found["probability"][0][2], abs=1e-6)


def test_bf16_is_close_to_fp32(folder: str) -> None:
    made = [BlipMatch(weights=folder, precision=p).score(batch(ROWS)) for p in ("bf16", "fp32")]  # type: ignore[arg-type]
    for name, tolerance in (("probability", 0.02), ("cosine", 0.02)):
        for half, full in zip(*(one[name] for one in made), strict=True):
            assert (half == pytest.approx(full, abs=tolerance) and None not in half) or None in full


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_mates_change_nothing(folder: str, precision: Any) -> None:
    one = BlipMatch(weights=folder, precision=precision)
    together = one.score(batch(ROWS))
    for i in range(len(ROWS)):
        alone = one.score(batch([ROWS[i]], [image(i)]))
        for name in ("probability", "cosine"):
            assert alone[name][0] == pytest.approx(together[name][i], abs=1e-6)


def test_a_text_of_ten_thousand_characters_is_cut_and_counted(folder: str) -> None:
    found = BlipMatch(weights=folder).score(batch([(["a red box " * 1000, "a box"], None)]))
    assert found["cut"] == [1] and None not in found["probability"][0]
    short = BlipMatch(weights=folder).score(batch([(["a red box " * 999, "a box"], None)]))
    assert found["probability"] == short["probability"]


def test_an_image_that_does_not_decode_matches_nothing(folder: str) -> None:
    found = BlipMatch(weights=folder).score(batch(ROWS[:2], [None, image(1)]))
    assert found["probability"][0] == [None] * 3 and found["probability"][1][0] is not None


def test_weights_that_are_none_stop_with_advice(folder: str, tmp_path: Path) -> None:
    captioner = str(WEIGHTS["blip_caption"](tmp_path)["weights"])
    for weights, told in (
        (captioner, "BlipForImageTextRetrieval"),
        (str(tmp_path / "none"), "config.json"),
        ("previous", "first_filter"),
        ("nobody/no-such-blip@main", "no-such-blip"),
    ):
        with pytest.raises(PairmillError, match=told):
            load_filter("blip_match", {"weights": weights}).content_hashes()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(PairmillError, match=r"tokenizer\.json"):
        load_filter("blip_caption", {"weights": captioner}).content_hashes()


def test_texts_longer_than_the_models_places_stop_the_run(folder: str) -> None:
    with pytest.raises(PairmillError, match="within the match filter's 70 places"):
        measure(load_filter("blip_match", {"weights": folder, "max_tokens": 71}), batch(ROWS), FilterStats())
    for few in (2, 1, 0, -1):  # two marks, and no text
        with pytest.raises(PairmillError, match=r"max_tokens: .* greater than or equal to 3"):
            load_filter("blip_match", {"weights": folder, "max_tokens": few})


@pytest.mark.parametrize("offline", [True, False])
def test_weights_that_are_none_are_told_without_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "round").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: pytest.fail("a hub was asked"))
    for weights in ("captoiner", "round/captioner", "round/1/captioner", "~/captioner"):
        with pytest.raises(PairmillError, match="no such folder"):
            load_filter("blip_caption", {"weights": weights}).check()
    published = load_filter("blip_match", {"weights": f"nobody/blip@{'0' * 40}"})
    if offline:
        with pytest.raises(PairmillError, match=r"folder or published BLIP nobody/blip@0.*in the local cache"):
            published.check()
    else:
        published.check()


@pytest.mark.parametrize("broken", ["{", "[]", '{"architectures": 5}', "\udcff"])
def test_a_config_that_is_broken_is_told(folder: str, tmp_path: Path, broken: str) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "config.json").write_bytes(broken.encode(errors="surrogateescape"))
    with pytest.raises(PairmillError, match=r"no settings in config\.json"):
        blip_hashes(str(copied), MATCHES)


def test_what_no_one_reads_is_no_part_of_a_folder(folder: str, tmp_path: Path) -> None:
    before, copied = content_hash(Path(folder)), shutil.copytree(folder, tmp_path / "copied")
    assert blip_hashes(folder, MATCHES) == {"weights": before}, "what save_pretrained leaves is read"
    for name in ("README.md", "pytorch_model.bin", ".cache/huggingface/model.safetensors"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("more")
    (copied / "refs").symlink_to(tmp_path)
    assert blip_hashes(str(copied), MATCHES) == {"weights": before}
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    assert blip_hashes(str(copied), MATCHES) != {"weights": before}
