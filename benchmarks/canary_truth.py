"""Whether canaries tell the truth: ROC-AUC, recall and false drops of every filter on defects that this script plants
into real pairs, with what the canaries of the same run estimate beside them.

    python benchmarks/canary_truth.py FOLDER --pairs DIR [--train 2000] [--test 3000] [--steps 200] [--per-defect 450]

DIR holds images with `<stem>.txt` beside them. Some train a small CLIP; the others, unseen by it, become the corpus:
20 % get another pair's text, 4 % a copy of their file, 6 % a resized, cropped or mirrored one, 3 % each a watermark, no
content, boilerplate or a sentence of another language, drawn here and not by the code that makes canaries. Nobody
vouches for the corpus, so the canaries are made of it, and their figures are freed of its noise. Text, image and copies
are drawn independently, as canaries' origins are; truth compares the pairs that have a defect with those that don't.
Prints markdown.
"""

import argparse
import contextlib
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps

from filters.canary_figures import Figure, roc_auc, verdict_auc, wilson
from filters.columns import load_frame
from filters.rules import numbers
from pairs.schemas import SELECTION
from pipelines import stages
from pipelines.console import Console
from pipelines.models import model_folder
from pipelines.run import Run, open_run

TEXTS = {"swapped_text": 0.20, "boilerplate_text": 0.03, "other_language": 0.03}
IMAGES = {"watermark": 0.03, "blank": 0.03}
COPIES = {"exact_duplicate": 0.04, "near_duplicate": 0.06}
SHARES = TEXTS | IMAGES | COPIES
STOCK = ("Photo 1 of 1", "No caption", "See also", "Buy now and save 20 % today", "Image placeholder", "Back to top",
         "By using this site you accept our terms", "Picture supplied by the seller", "Zoom")  # fmt: skip
FOREIGN = ("Der Zug nach Hamburg hat heute leider Verspätung.", "Nous partons demain matin vers la montagne.",
           "Mi hermana trabaja en una librería del centro.", "Сегодня вечером обещают сильный дождь.")  # fmt: skip
Scores = dict[str, np.ndarray]
FETCH = {"side_px": 160, "shard_pairs": 500}
CLIP = {"steps": 200, "checkpoint_every": 10_000}


@dataclass(frozen=True)
class Truth:
    """What is wrong with a file, which other it is a copy of, and whether another is a copy of it."""

    defects: set[str]
    of: str | None
    copied: bool


def pairs_of(folder: Path, chance: random.Random) -> list[tuple[Path, str]]:
    """Images with the first line of their text, in a drawn order."""
    texts = [(p, p.with_suffix(".txt")) for p in sorted(folder.iterdir()) if p.suffix in (".jpg", ".png")]
    found = [(p, t.read_text(errors="replace").strip().splitlines()[:1]) for p, t in texts if t.exists()]
    whole = [(p, lines[0].strip()) for p, lines in found if lines and lines[0].strip()]
    chance.shuffle(whole)
    return whole


def altered(path: Path, defect: str, chance: random.Random) -> Image.Image:
    """The picture with the defect, as Pillow draws it."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if defect == "blank":
        flat = Image.new("RGB", image.size, chance.choice(["white", "lightgrey", "black"]))
        return flat if chance.random() < 0.5 else ImageOps.expand(flat, border=2, fill="grey")
    if defect == "watermark":
        layer = Image.new("RGBA", image.size)
        words, font = chance.choice(["demo version", "not for resale"]), ImageFont.load_default(max(10, width // 9))
        ImageDraw.Draw(layer).text((width // 12, height * 0.4), words, fill=(255, 255, 255, 140), font=font)
        return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
    kind = chance.choice(["resize", "crop", "mirror"])
    if kind == "resize":
        return image.resize((max(8, int(width * 0.7)), max(8, int(height * 0.7))), Image.Resampling.LANCZOS)
    if kind == "crop":
        return image.crop((width // 50, height // 50, width - width // 50, height - height // 50))
    return ImageOps.mirror(image)


def drawn(shares: dict[str, float], chance: random.Random) -> str:
    """One of the defects, each with its share; mostly none."""
    draw = chance.random()
    for defect, share in shares.items():
        draw -= share
        if draw < 0:
            return defect
    return ""


def write_corpus(pairs: list[tuple[Path, str]], folder: Path, chance: random.Random) -> dict[str, Truth]:
    """Writes the corpus; returns by file what is wrong with it."""
    folder.mkdir(parents=True)
    truth = {}
    for n, (path, text) in enumerate(pairs):
        words, look, copy = (drawn(shares, chance) for shares in (TEXTS, IMAGES, COPIES))
        name = f"{n:05d}{path.suffix}"
        if words == "swapped_text":
            text = next(t for t in iter(lambda: chance.choice(pairs)[1], None) if t.casefold() != text.casefold())
        text = {"boilerplate_text": chance.choice(STOCK), "other_language": chance.choice(FOREIGN)}.get(words, text)
        if look:
            altered(path, look, chance).save(folder / name, quality=90)
        else:
            shutil.copyfile(path, folder / name)
        truth[name] = Truth({words, look} - {""}, None, bool(copy))
        if copy:
            twin = f"copy-{name}"
            if copy == "near_duplicate":
                altered(folder / name, copy, chance).save(folder / twin, quality=85)
            else:
                shutil.copyfile(folder / name, folder / twin)
            (folder / twin).with_suffix(".txt").write_text(text)
            truth[twin] = Truth({words, look, copy} - {""}, name, False)
        (folder / name).with_suffix(".txt").write_text(text)
    return truth


def run_until(recipe: dict[str, Any], home: Path, trains: bool) -> Run:
    """The recipe's stages up to the first filter (`trains`) or to the curation of one round, in this process."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run = open_run(home / "recipe.yaml", workspace=str(home / "space"), console=Console(quiet=True))
    stages.check(run.recipe)
    with run.workspace.lock(), contextlib.closing(run):
        stages.crawl(run)
        stages.fetch(run)
        scorer = stages.first_filter(run)
        if trains:
            run.write("scorer-of-benchmark.json", scorer)
        else:
            stages.curate(run, 1, scorer)
    return run


def scorer(pairs: list[tuple[Path, str]], folder: Path, steps: int) -> Path:
    """A small CLIP trained on `pairs`."""
    home = folder / "train"
    if not home.exists():
        home.mkdir(parents=True)
        for n, (path, text) in enumerate(pairs):
            shutil.copyfile(path, home / f"{n:05d}{path.suffix}")
            (home / f"{n:05d}.txt").write_text(text)
    recipe = {"name": "scorer", "sources": {"clean": {"kind": "folder", "path": str(home), "trusted": True}},
              "fetch": FETCH, "canaries": {"per_defect": 0}, "first_filter": {"clip": CLIP | {"steps": steps}},
              "engine": "inline"}  # fmt: skip
    run = run_until(recipe, folder / "scorer", trains=True)
    return model_folder(run.workspace, run.read("scorer-of-benchmark.json")["models"]["clip"])


def recipe_of(corpus: Path, model: Path, per_defect: int) -> dict[str, Any]:
    return {
        "name": "truth",
        "sources": {"web": {"kind": "folder", "path": str(corpus)}},
        "fetch": FETCH,
        "filters": {"image_stats": {}, "text_stats": {}, "language": {}, "image_hash": {}}
        | {"clip": {"weights": str(model)}},
        "reducers": {"exact_duplicates": {}, "near_duplicates": {}},
        "keep": [
            {"column": "image_stats.blankness", "max": 0.97},
            {"column": "text_stats.words", "min": 2},
            {"column": "clip.cosine", "target_recall": 0.5, "defect": "swapped_text"},
            {"one_per": "exact_duplicates.group"},
            {"one_per": "near_duplicates.group", "best": "clip.cosine"},
        ],
        "canaries": {"per_defect": per_defect, "max_fraction": 1.0},
        "engine": "inline",
    }


def true_figures(run: Run, truth: dict[str, Truth], told: dict[str, Any]) -> dict[str, dict[str, Figure]]:
    """Of each defect the AUC of every score and the recall and false drops of every rule, among pairs with that defect
    and pairs without it. Which of two copies stays is chance, so rules aren't asked about them: their scores tell."""
    curated, store = run.read("round-1/curation.json"), run.workspace.store
    scores = [entry["column"] for entry in told["swapped_text"]["auc"]]
    groups = [f"{name}.group" for name in ("exact_duplicates", "near_duplicates")]
    frame = load_frame(store, stages.shards(run), [*scores, *groups, "pairs.url"], curated["scores"], [])
    verdict = pa.concat_tables(
        store.read_table(ref.beside(curated["selection"])).cast(SELECTION) for _, ref in frame.shards
    )
    would = [set(names) for names in verdict["would_drop"].to_pylist()]
    facts = [truth[url.rpartition(":")[2]] for url in frame.table["pairs.url"].to_pylist()]
    values = {name: numbers(frame.table[name], name) for name in scores if name not in groups}
    values |= copies(frame.table, facts, frame.table["pairs.url"].to_pylist(), values)
    found: dict[str, dict[str, Figure]] = {}
    for defect in SHARES:
        bad = np.array([defect in fact.defects for fact in facts])
        good = ~bad & np.array([not (defect in COPIES and (fact.copied or fact.of)) for fact in facts])
        found[defect] = {name: roc_auc(v[bad], v[good]) for name, v in values.items()}
        for rule in (entry["rule"] for entry in told[defect]["rules"]):
            caught = np.array([bool(names) if rule == "selection" else rule in names for names in would])
            if rule.startswith("one_per") or rule == "selection" or defect in COPIES:
                continue
            recall, wrong = (wilson(caught[mask].sum(), mask.sum()) for mask in (bad, good))
            found[defect][f"{rule} recall"], found[defect][f"{rule} false drops"] = recall, wrong
            found[defect][f"{rule} AUC"] = verdict_auc(recall, wrong)
    return found


def copies(table: pa.Table, facts: list[Truth], urls: list[str], values: Scores) -> Scores:
    """The reducers' answers as scores: a copy is near where it is in its original's group, another pair where it is in
    anybody's but its own."""
    uids, place = table["uid"].to_pylist(), {url.rpartition(":")[2]: n for n, url in enumerate(urls)}
    other = [place.get(fact.of or "") for fact in facts]
    made = {}
    for name in ("exact_duplicates", "near_duplicates"):
        group = table[f"{name}.group"].to_pylist()
        pairs = zip(group, (u if o is None else None for u, o in zip(uids, other, strict=True)), other, strict=True)
        joined = np.array([g is not None and (g != u if o is None else g == group[o]) for g, u, o in pairs], bool)
        made[f"{name}.group"] = 1.0 - joined
        if (distance := values.get(f"{name}.distance")) is not None:
            near = [d if o is None else max(d, distance[o]) for d, o in zip(distance, other, strict=True)]
            made[f"{name}.distance"] = np.where(joined, near, np.inf)
    return made


def shown(figure: Figure | None) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--skip", type=int, default=0, help="pairs after the training ones that are left out")
    parser.add_argument("--test", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--per-defect", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance, folder = random.Random(given.seed), given.folder.resolve()
    pairs = pairs_of(given.pairs, chance)
    model = scorer(pairs[: given.train], folder, given.steps)
    corpus = folder / "corpus"
    shutil.rmtree(corpus, ignore_errors=True)
    truth = write_corpus(pairs[given.train + given.skip :][: given.test], corpus, chance)
    run = run_until(recipe_of(corpus, model, given.per_defect), folder / "truth", trains=False)
    told = run.read("round-1/curation.json")["canaries"]["defects"]
    tell(true_figures(run, truth, told), told)


def tell(true: dict[str, dict[str, Figure]], told: dict[str, Any]) -> None:
    """The tables: noise and counts per defect, then every figure that tells something."""
    print("| defect | reporting canaries | noise found, at most | really |\n| --- | --- | --- | --- |")
    for defect, facts in told.items():
        noise = facts["noise"] and f"{facts['noise']['value']:.3f}, {facts['noise']['high']:.3f}"
        print(f"| {defect} | {facts['canaries']} | {noise} | {SHARES[defect]:.2f} |")
    print("\n| defect | figure | truth | canaries saw | corrected | covers |\n| --- | --- | --- | --- | --- | --- |")
    hits = total = 0
    for defect, facts in told.items():
        figures = {entry["column"]: entry["auc"] for entry in facts["auc"]}
        for rule in facts["rules"]:
            parts = {"recall": rule["recall"], "false drops": rule["false_drops"], "AUC": rule["auc"]}
            figures |= {f"{rule['rule']} {name}": figure for name, figure in parts.items()}
        for name, figure in figures.items():
            real = true[defect].get(name)
            if real is None or real["value"] is None or figure["value"] is None or dull(name, real, figure):
                continue
            covers = figure["low"] <= real["value"] <= figure["high"]
            meets = real["low"] <= figure["high"] and figure["low"] <= real["high"]
            hits, total = hits + covers, total + 1
            word = "yes" if covers else "intervals meet" if meets else "NO"
            print(f"| {defect} | {name} | {shown(real)} | {figure.get('observed', figure['value']):.3f} | "
                  f"{shown(figure)} | {word} |")  # fmt: skip
    print(f"\n{hits} of {total} intervals cover the truth's own estimate.")


def dull(name: str, real: Figure, figure: Figure) -> bool:
    """Figures of what says nothing about a defect are left out, and of columns that say what another says."""
    middle, least = (0.0, 0.02) if name.endswith(("recall", "false drops")) else (0.5, 0.08)
    chance = real["low"] <= middle <= real["high"]
    return name == "clip.cosines" or (abs(figure["value"] - middle) < least and chance)


if __name__ == "__main__":
    main()
