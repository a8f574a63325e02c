"""Does curation help, at equal compute? Zero-shot accuracy on clean held-out scenes of a CLIP pretrained on raw pairs,
on filtered ones, and on CapFilt's, several seeds each; and the same on a web without defects, where it must not help.

    python benchmarks/curation.py FOLDER [--seeds 211 212 213] [--noise 0.3] [--clean] [--recipe recipes/demo.yaml]

All arms of a seed share one workspace: the same pairs, the same first filter, the same scores, steps and batch;
trusted pairs are in every arm. `raw` keeps every pair with its first text, `filter` applies the rules and the text
match to the web's texts, `capfilt` adds synthetic captions. One round each.
"""

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipelines.demo.server import running_server
from pipelines.demo.web import make_web

PORT = 8794


def arms(base: dict[str, Any], clean: bool) -> dict[str, dict[str, Any]]:
    """The recipe of each arm; they differ in `keep` and `texts` alone."""
    raw, filtered, capfilt = (copy.deepcopy(base) for _ in range(3))
    raw["keep"], raw["texts"] = [], {"from": ["texts"], "keep": "first"}
    filtered["texts"] = base["texts"] | {"from": ["texts"], "match": "blip_match.probability"}
    filtered["filters"]["blip_match"] = {"weights": "previous", "of": ["texts"]}
    filtered["filters"].pop("blip_caption")
    named = {"raw": raw, "filter": filtered, "capfilt": capfilt}
    return {name: recipe | {"name": f"arm-{name}", "rounds": 1, "gates": {}} for name, recipe in named.items()
            if not (clean and name == "filter")}  # fmt: skip


def based(recipe: Path, home: Path, seed: int, port: int = PORT) -> dict[str, Any]:
    """The recipe on the demo web of `home`, with the seed."""
    base: dict[str, Any] = yaml.safe_load(recipe.read_text())
    base["sources"]["web"]["seeds"] = [f"http://127.0.0.11:{port}/"]
    base["sources"]["trusted"]["path"] = str(home / "web/trusted")
    base["evaluate"]["zero_shot"]["path"] = str(home / "web/eval")
    base["seed"] = base["pretrain"]["seed"] = seed
    return base


def run_arms(home: Path, recipes: dict[str, dict[str, Any]], port: int = PORT) -> dict[str, dict[str, Any]]:
    """Runs each recipe (written to `home`) in the one workspace there; returns their reports. What is done stays."""
    found, command = {}, [str(Path(sys.executable).parent / "pairmill"), "run"]
    with running_server(home / "web", port):
        for name, recipe in recipes.items():
            path = home / f"{name}.yaml"
            path.write_text(yaml.safe_dump(recipe, sort_keys=False))
            options = ["--workspace", str(home / "space"), "--json"]
            told = subprocess.run([*command, str(path), *options], check=True, stdout=subprocess.PIPE, text=True)
            run = json.loads(told.stdout)["run"]
            found[name] = json.loads((home / "space" / run / "report.json").read_text())
    return found


def figures(report: dict[str, Any], number: int) -> dict[str, float]:
    """The figures of a round's models; those of the fine-tuned ones say so."""
    mine = [row for row in report["evaluation"] if row["model"].partition(",")[0] == f"round {number}"]
    names = (row["figure"] + row["model"].removeprefix(f"round {number}") for row in mine)
    return {name: row["value"] for name, row in zip(names, mine, strict=True) if row["value"] is not None}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "standard_error": round(error, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[211, 212, 213])
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    arguments = parser.parse_args()
    clean, noise = arguments.clean, 0.0 if arguments.clean else arguments.noise
    found = {}
    for seed in arguments.seeds:
        home = arguments.folder.resolve() / f"seed-{seed}{'-clean' if clean else ''}"
        make_web(home / "web", seed=seed, noise=noise, port=PORT, clean=clean)
        reports = run_arms(home, arms(based(arguments.recipe, home, seed), clean))
        found[seed] = {name: figures(report, 1) for name, report in reports.items()}
        print(seed, found[seed], flush=True)
    names = list(next(iter(found.values())))
    told = list(next(iter(found.values()))["raw"])
    table = {figure: {n: spread([f[n][figure] for f in found.values()]) for n in names} for figure in told}
    gains = {
        figure: {n: spread([f[n][figure] - f["raw"][figure] for f in found.values()]) for n in names[1:]}
        for figure in told
    }
    print(json.dumps({"noise": noise, "clean": clean, "by_seed": found,
                      "means": table, "gain_over_raw_paired": gains}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
