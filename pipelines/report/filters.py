"""What each filter did: speed as measured when it ran, nulls and errors as its tables tell them.

`runs/<id>/speed.json` sums pairs and seconds over all that a run scored, resumed or not; seconds are those of one
worker. Nulls and errors are in the tables' own footers, so that a run that finds them there tells them too.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from filters.engine import Stats
from filters.score_tables import told_by_tables
from pairs.shard import ShardRef
from pipelines.run import Run

SPEED = "speed.json"
DECODE = "decoding"


def keep(run: Run, stats: Stats) -> None:
    """Adds what was just scored to the run's record, and prints a line per filter."""
    done = {DECODE: (stats.decoded, stats.decode_s)} if stats.decoded else {}
    done |= {name: (one.pairs, one.seconds) for name, one in stats.filters.items()}
    errors = {DECODE: stats.crashes} | {name: one.errors for name, one in stats.filters.items()}
    nulls = {DECODE: Counter(image=stats.undecodable)} | {name: one.nulls for name, one in stats.filters.items()}
    before = run.read(SPEED) or {}
    for name, (pairs, seconds) in done.items():
        told = [f"{pairs / seconds:,.0f} pairs/s a worker" if seconds else f"{pairs} pairs"]
        told += [f"null: {_counted(nulls[name])}"] * any(nulls[name].values())
        told += [f"errors: {_counted(errors[name])}"] * any(errors[name].values())
        run.console.say(f"  {name:<18} {', '.join(told)}")
        sums = before.get(name, {"pairs": 0, "seconds": 0.0})
        before[name] = {"pairs": sums["pairs"] + pairs, "seconds": sums["seconds"] + seconds}
    if stats.waited_s > 1 + 0.05 * sum(one.seconds for one in stats.filters.values()):
        run.console.say(f"  models waited {stats.waited_s:.1f} s for images")
    run.write(SPEED, before)


def rows(run: Run, scores: Mapping[str, str], shards: Iterable[ShardRef]) -> list[dict[str, Any]]:
    """One row per filter for the report: pairs, pairs/s, nulls by column, errors by reason."""
    speed, refs, found = run.read(SPEED) or {}, list(shards), []
    for name in (name for name in scores if name in run.recipe.filters):
        pairs, nulls, errors = told_by_tables(run.workspace.store, scores[name], refs)
        seconds = speed.get(name, {}).get("seconds")
        rate = speed[name]["pairs"] / seconds if seconds else None
        told = {"pairs": pairs, "pairs_per_s": rate, "null": _counted(nulls), "error": _counted(errors)}
        found.append({"filter": name} | told)
    return found


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common() if count)
