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


def run_seed(folder: Path, seed: int, noise: float, clean: bool, recipe: Path) -> dict[str, dict[str, float]]:
    """The figures of each arm's model on the web of one seed."""
    home = folder / f"seed-{seed}{'-clean' if clean else ''}"
    make_web(home / "web", seed=seed, noise=0.0 if clean else noise, port=PORT, clean=clean)
    base = yaml.safe_load(recipe.read_text())
    base["sources"]["web"]["seeds"] = [f"http://127.0.0.11:{PORT}/"]
    base["sources"]["trusted"]["path"] = str(home / "web/trusted")
    base["evaluate"]["zero_shot"]["path"] = str(home / "web/eval")
    base["seed"] = base["pretrain"]["seed"] = seed
    found = {}
    with running_server(home / "web", PORT):
        for name, arm in arms(base, clean).items():
            path = home / f"{name}.yaml"
            path.write_text(yaml.safe_dump(arm, sort_keys=False))
            command = [
                str(Path(sys.executable).parent / "pairmill"),
                "run",
                str(path),
                "--workspace",
                str(home / "space"),
            ]
            subprocess.run([*command, "--json"], check=True, stdout=subprocess.DEVNULL)
            rows = sorted((home / "space/runs").glob(f"arm-{name}-*/round-1/evaluation.json"))[-1]
            found[name] = {r["figure"]: r["value"] for r in json.loads(rows.read_text()) if r["model"] == "round 1"}
            print(seed, name, found[name], flush=True)
    return found


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
    folder = arguments.folder.resolve()
    found = {s: run_seed(folder, s, arguments.noise, arguments.clean, arguments.recipe) for s in arguments.seeds}
    names = list(next(iter(found.values())))
    figures = list(next(iter(found.values()))["raw"])
    table = {figure: {n: spread([f[n][figure] for f in found.values()]) for n in names} for figure in figures}
    gains = {
        figure: {n: spread([f[n][figure] - f["raw"][figure] for f in found.values()]) for n in names[1:]}
        for figure in figures
    }
    print(json.dumps({"noise": 0.0 if arguments.clean else arguments.noise, "clean": arguments.clean, "by_seed": found,
                      "means": table, "gain_over_raw_paired": gains}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
