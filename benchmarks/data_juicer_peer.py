"""Runs data-juicer's own executor over a recipe, several times in one process, so that the later runs are warm.

    PEER/bin/python benchmarks/data_juicer_peer.py RECIPE.json REPEATS

Prints one JSON object: the seconds of each run (load, process, export), the names of the kept images, and the
peak memory of the process with its children. Belongs to `benchmarks/against_data_juicer.py`.
"""

import json
import resource
import sys
import time
from pathlib import Path

from memory import Peak


def main() -> None:
    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor

    recipe, repeats = Path(sys.argv[1]), int(sys.argv[2])
    told, seconds = json.loads(recipe.read_text()), []
    peak = Peak()
    peak.start()
    for number in range(repeats):
        told["export_path"] = str(recipe.with_name(f"kept-{number}.jsonl"))
        told["work_dir"] = str(recipe.with_name(f"work-{number}"))
        recipe.write_text(json.dumps(told))  # JSON is YAML
        began = time.perf_counter()
        DefaultExecutor(init_configs(["--config", str(recipe)])).run()
        seconds.append(time.perf_counter() - began)
    rows = [json.loads(line) for line in Path(told["export_path"]).read_text().splitlines()]
    kept = sorted(Path(row["images"][0]).name for row in rows)
    cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": seconds, "kept": kept, "peak_bytes": peak.bytes, "cpu_s": cpu}), file=sys.__stdout__)


if __name__ == "__main__":
    main()
