"""Captions and matches of real pairs: clip-art as the web, stamps as the trusted pairs (`real_pairs.py` makes both).

    python benchmarks/real_captions.py PAIRS FOLDER [--clipart 300] [--stamps 785] [--steps 900]

Copies the pairs into two folders and lets `pairmill run` do a round of CapFilt: captioner and match filter learn on the
stamps, look at all, a BLIP is pretrained on what matches, and its own captioner and filter, fine-tuned on the stamps,
look at all again. Writes FOLDER/captions-1.png and -2.png, before and after the round: the text, captions and match
probabilities of clip-art and of held-out stamps. Prints a Markdown table: the ROC-AUC of the match probability, an
image's own first text against another pair's of its kind, drawn here, with 95 % intervals; and what matched. Held-out
stamps are trained on by none; the clip-art's titles are what the round's BLIP was pretrained on. What is done is found
again.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml

from filters.base import Batch
from filters.canary_figures import roc_auc
from filters.images import decode
from filters.lookup import load_filter
from pairs.identity import held_out, unit_hash
from pairs.shard import ShardRef
from pipelines import stages
from pipelines.console import Console
from pipelines.models import model_folder
from pipelines.run import Run, open_run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ACROSS, DOWN = 6, 4  # of each kind


@dataclass(frozen=True)
class Looked:
    """A pair with what the filters say of it: captions, and the match of each text and caption."""

    uid: str
    image: np.ndarray
    texts: list[str]
    captions: list[str]
    matches: list[float | None]


def place(pairs: Path, folder: Path, kind: str, most: int) -> Path:
    """A folder with the `most` first pairs of a kind, by hash of their names."""
    images = sorted(pairs.glob(f"{kind}-*.jpg"), key=lambda path: unit_hash("real-captions", path.name))[:most]
    target = folder / kind
    if {path.name for path in target.glob("*.jpg")} != {path.name for path in images}:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in images:
            shutil.copy(path, target)
            shutil.copy(path.with_suffix(".txt"), target)
    return target


def finished(pairs: Path, folder: Path, recipe: Path, clipart: int, stamps: int, steps: int | None) -> Run:
    """The run whose first filter and whose round's models have looked at all pairs."""
    base: dict[str, Any] = yaml.safe_load(recipe.read_text())
    base["pretrain"] |= {"steps": steps} if steps else {}
    trusted = {"kind": "folder", "path": str(place(pairs, folder, "stamp", stamps)), "trusted": True}
    web = {"kind": "folder", "path": str(place(pairs, folder, "clipart", clipart))}
    base |= {
        "name": "real-captions",
        "sources": {"web": web, "trusted": trusted},
        "gates": {},
        "evaluate": {},
        "rounds": 1,
    }
    path, space = folder / "recipe.yaml", folder / "space"
    path.write_text(yaml.safe_dump(base, sort_keys=False))
    command = [str(Path(sys.executable).parent / "pairmill"), "run", str(path), "--workspace", str(space), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = open_run(path, workspace=str(space), console=Console(quiet=True))
    with run.workspace.lock(), contextlib.closing(run):
        stages.curate(run, 2, run.read("round-1/promotion.json")["scorer"])
    return run


def looked(run: Run, refs: Sequence[ShardRef], scores: dict[str, str]) -> list[Looked]:
    """The living pairs of the shards with their texts, captions and matches."""
    store, found = run.workspace.store, []
    for ref in refs:
        table = store.read_table(ref.table)
        captions = store.read_table(ref.beside(scores["blip_caption"]))["texts"].to_pylist()
        matches = store.read_table(ref.beside(scores["blip_match"]))["probability"].to_pylist()
        for living, row, own, match in zip(
            run.workspace.alive(table), table.to_pylist(), captions, matches, strict=True
        ):
            image = decode(store.read(ref.tar, row["image_offset"], row["image_size"])) if living else None
            if image is not None:
                texts = [entry["text"] for entry in row["texts"]]
                found.append(
                    Looked(row["uid"], image, texts, own or [], match or [None] * (len(texts) + len(own or [])))
                )
    return found


def swapped(pairs: Sequence[Looked], seed: int) -> list[str]:
    """For each pair the first text of another one that says something else."""
    chance, texts = random.Random(seed), [pair.texts[0] for pair in pairs]
    others = {text: [o for o in texts if o.casefold() != text.casefold()] for text in set(texts)}
    return [chance.choice(others[text]) for text in texts]


def auc(one: Any, pairs: Sequence[Looked], least: float, seed: int) -> dict[str, Any]:
    """ROC-AUC of own texts over swapped ones, and the share of each with at least `least`."""
    rows: list[list[float]] = []
    wrong = swapped(pairs, seed)
    for start in range(0, len(pairs), 256):
        some = pairs[start : start + 256]
        texts = [[p.texts[0], other] for p, other in zip(some, wrong[start : start + 256], strict=True)]
        batch = Batch(
            [p.uid for p in some], {"texts": [[{"text": t} for t in row] for row in texts]}, [p.image for p in some]
        )
        rows += one.score(batch)["probability"]
    own, other = np.array(rows, float).T
    return roc_auc(other, own) | {"own": float((own >= least).mean()), "swapped": float((other >= least).mean())}


def draw(kinds: dict[str, list[Looked]], path: Path) -> None:
    """Images with what is said of them; the probability that it matches stands before each text."""
    figure, axes = plt.subplots(DOWN * len(kinds), ACROSS, figsize=(3 * ACROSS, 3.2 * DOWN * len(kinds)))
    shown = [(kind, pair) for kind, pairs in kinds.items() for pair in (pairs * ACROSS * DOWN)[: ACROSS * DOWN]]
    for axis, (kind, pair) in zip(axes.flat, shown, strict=True):
        axis.imshow(pair.image)
        axis.set_axis_off()
        makers = [kind] * len(pair.texts) + ["BLIP"] * len(pair.captions)
        said = zip(makers, pair.texts + pair.captions, pair.matches, strict=True)
        lines = [
            f"{'–' if p is None else f'{p:.2f}'} {maker}: {textwrap.fill(text[:120], 40)}" for maker, text, p in said
        ]
        axis.set_title("\n".join(lines), fontsize=7, loc="left", parse_math=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/capfilt.yaml"))
    parser.add_argument("--steps", type=int, help="of the round's pretraining, in place of the recipe's")
    parser.add_argument("--clipart", type=int, default=1_000_000)
    parser.add_argument("--stamps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    run = finished(asked.pairs, folder, asked.recipe, asked.clipart, asked.stamps, asked.steps)
    heads = "scorer, pairs, threshold, n, ROC-AUC of own over swapped, own matched, swapped matched, captions matched"
    print(f"| {heads.replace(', ', ' | ')} |")
    print("| --- " * 8 + "|")
    for number in (1, 2):
        facts = run.read(f"round-{number}/curation.json")
        kinds = {name: looked(run, refs, facts["scores"]) for name, refs in stages.shards(run).items()}
        kinds["trusted"] = [pair for pair in kinds["trusted"] if held_out(pair.uid)]
        for kind, pairs in kinds.items():
            print(f"| {facts['scorer']['name']} | {kind} | {row(run, facts, pairs, asked.seed)} |", flush=True)
        order = {kind: sorted(pairs, key=lambda p: unit_hash("grid", p.uid)) for kind, pairs in kinds.items()}
        draw(order, folder / f"captions-{number}.png")
    print("\n| model | figure | value | interval |\n| --- | --- | --- | --- |")
    for found in run.read("round-1/evaluation.json"):
        told = [f"{found[name]:.3f}" if found[name] is not None else "–" for name in ("value", "low", "high")]
        print(f"| {found['model']} | {found['figure']} | {told[0]} | {told[1]} to {told[2]} |")


def row(run: Run, facts: dict[str, Any], pairs: Sequence[Looked], seed: int) -> str:
    """Cells of the table: how well the match filter of a curation (`facts`) tells own texts from swapped ones."""
    weights = str(model_folder(run.workspace, facts["scorer"]["models"]["matcher"]))
    one = load_filter("blip_match", run.recipe.filters["blip_match"] | {"of": ["texts"], "weights": weights})
    pins = json.loads(run.workspace.store.read(f"{facts['selection']}/manifest.json"))["thresholds"]
    told = auc(one, pairs, least := run.recipe.texts.at(pins).min, seed)
    written = [p for pair in pairs for p in pair.matches[len(pair.texts) :]]
    matched = sum(p is not None and p >= least for p in written)
    ends = f"{told['value']:.3f} ({told['low']:.3f} to {told['high']:.3f})"
    return (
        f"{least:.2f} | {told['n']} | {ends} | {told['own']:.1%} | {told['swapped']:.1%} | {matched} of {len(written)}"
    )


if __name__ == "__main__":
    main()
