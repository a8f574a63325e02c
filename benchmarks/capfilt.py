"""BLIP's ablation of CapFilt on the demo web, at equal steps and batch: what captioner and filter give a new model.

    python benchmarks/capfilt.py FOLDER [--objective clip] [--seeds 224 225 226] [--arms raw filter] [--rules]

Five arms of each seed share a workspace: the same pairs, one captioner and one filter (the first filter's), the same
scores; the trusted pairs are in each. `raw` trains on all of the web's texts, `filter` on those that match, `captioner`
on web and synthetic texts, `capfilt` on those of both that match, `second round` again so with what the first round
trained; which of it was promoted is printed (where nothing was, the second round is the first again). They differ in
`texts` alone (and in what is matched); no arm has rules of `keep`, but with `--rules` those that match have the
recipe's. The planted truth tells which swapped texts were dropped (pairs none of whose web texts stayed); ITC is the
contrast's loss over the last tenth of the steps. Prints a table for benchmarks/results: means, and differences to `raw`
paired by seed with their standard errors. The same command goes on where it was stopped. An arm alone, at SEED = 224:

    pairmill demo-web FOLDER/seed-224/web --port 8795 --serve &
    pairmill run FOLDER/seed-224/capfilt.yaml --workspace FOLDER/seed-224/space
"""

import argparse
import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curation import based, figures, run_arms, spread
from demo_truth import rows, swapped, truth_of

from pairs.shard import list_shards
from pairs.workspace import Workspace
from pipelines.demo.web import make_web

PORT = 8795
ROLES = ("captioner", "matcher")
ARMS = ("raw", "filter", "captioner", "capfilt", "second round")
RECIPES = {"clip": "recipes/demo.yaml", "blip": "recipes/capfilt.yaml"}
CAPTIONS = ["texts", "blip_caption.texts"]
PAPER = """
BLIP, 14M images, after fine-tuning on COCO (arXiv 2201.12086, table 1; its rows of one alone aren't quoted):

| | without | with CapFilt |
| --- | --- | --- |
| TR@1 | 78.4 | 80.6 |
| IR@1 | 60.7 | 63.1 |
| caption CIDEr | 127.8 | 129.7 |
"""


def recipes(base: dict[str, Any], wanted: Sequence[str], rules: bool) -> dict[str, dict[str, Any]]:
    """The recipe of each arm; a second round is one of CapFilt's."""
    match = base["texts"]["match"]
    texts = {
        "raw": {"from": ["texts"], "keep": "all"},
        "filter": base["texts"] | {"from": ["texts"]},
        "captioner": {"from": CAPTIONS, "keep": "all"},
        "capfilt": base["texts"] | {"from": CAPTIONS, "match": match},
    }
    made = {}
    for name, chosen in texts.items():
        if name in wanted or (name == "capfilt" and "second round" in wanted):
            arm = copy.deepcopy(base) | {"name": f"arm-{name}", "texts": chosen, "gates": {}}
            arm["keep"] = base["keep"] if rules and "match" in chosen else []
            arm["rounds"] = 2 if name == "capfilt" and "second round" in wanted else 1
            if name == "filter":
                arm["filters"]["blip_match"]["of"] = ["texts"]
            made[name] = arm
    return made


def of_arm(name: str, reports: Mapping[str, dict[str, Any]], web: Path) -> dict[str, float]:
    """An arm's figures, and the share of its web and its synthetic texts that didn't match."""
    report, number = reports[name.replace("second round", "capfilt")], 2 if name == "second round" else 1
    noise = report["rounds"][number - 1]["noise_ratios"] or {}
    ratios = {f"noise ratio, {kind} texts": told["value"] for kind, told in noise.items() if told["value"] is not None}
    return figures(report, number) | ratios | dropped(report, number, web) | learned(report, number)


def dropped(report: Mapping[str, Any], number: int, web: Path) -> dict[str, float]:
    """The share of the planted swaps, and of the true texts, that the round's selection dropped."""
    workspace = Workspace.open(report["workspace"])
    curated = json.loads(workspace.store.read(f"{report['run']}/round-{number}/curation.json"))
    refs = [ref for ref in list_shards(workspace.store, "pairs") if ref.group.startswith("web-")]
    told = swapped(list(rows(workspace, refs, curated["selection"], curated["scores"])), truth_of(web))
    return {
        "planted swaps dropped": told["recall"]["value"],
        "true texts dropped": told["false_drops"]["value"],
    }


def learned(report: Mapping[str, Any], number: int) -> dict[str, float]:
    """The contrast's loss at the end of a BLIP's pretraining."""
    home = Path(report["workspace"]) / report["run"] / f"round-{number}"
    paths = [path for path in home.glob("*/metrics.jsonl") if path.parent.name not in ROLES]  # none where it was reused
    losses = [json.loads(line).get("itc") for path in paths for line in path.read_text().splitlines()]
    last = losses[-max(1, len(losses) // 10) :]
    return {"ITC at the end": statistics.mean(last)} if last and None not in last else {}


def table(found: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: for each figure the mean of each arm and, where there is `raw`, the paired difference."""
    arms = list(next(iter(found.values())))
    names = list(dict.fromkeys(name for seed in found.values() for arm in seed.values() for name in arm))
    lines = ["| figure | " + " | ".join(arms) + " |", "| --- |" + " --- |" * len(arms)]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_cell(found, name, arm) for arm in arms) + " |")
    return "\n".join(lines)


def _cell(found: Mapping[int, Mapping[str, Mapping[str, float]]], name: str, arm: str) -> str:
    mine = {seed: arms[arm][name] for seed, arms in found.items() if name in arms[arm]}
    if not mine:
        return ""
    told = f"{spread(list(mine.values()))['mean']:.3f}"
    raw = {seed: found[seed].get("raw", {}).get(name) for seed in mine}
    gains = [value - before for seed, value in mine.items() if (before := raw[seed]) is not None]
    if arm == "raw" or not gains:
        return told
    gain = spread(gains)
    error = f" ± {gain['standard_error']:.3f}" if len(gains) > 1 else ""
    return f"{told} ({gain['mean']:+.3f}{error})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objective", choices=RECIPES, default="blip")
    parser.add_argument("--recipe", type=Path, help="in place of the objective's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[224, 225, 226])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rules", action="store_true")
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--scenes", type=int, default=2400, help="of the web; fewer for a try")
    parser.add_argument("--trusted", type=int, default=1100)
    asked = parser.parse_args()
    found: dict[int, dict[str, dict[str, float]]] = {}
    for seed in asked.seeds:
        home = asked.folder.resolve() / f"seed-{seed}"
        make_web(home / "web", seed, asked.noise, asked.scenes, asked.trusted, PORT)
        base = based(asked.recipe or Path(RECIPES[asked.objective]), home, seed, PORT)
        reports = run_arms(home, recipes(base, asked.arms, asked.rules), PORT)
        found[seed] = {name: of_arm(name, reports, home / "web") for name in asked.arms}
        for row in reports.get("capfilt", {"rounds": [{"compared": []}]})["rounds"][0]["compared"]:
            print(f"seed {seed}, {row['role']}: {row['told']}", flush=True)
        (asked.folder / "found.json").write_text(json.dumps(found, indent=1))
        print(f"\nSeed {seed}:\n\n{table({seed: found[seed]})}", flush=True)
    print(f"\nMeans of {len(found)} seeds (difference to raw, paired, ± standard error):\n\n{table(found)}\n{PAPER}")


if __name__ == "__main__":
    main()
