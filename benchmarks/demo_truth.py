"""What a run on the demo web really caught, against the web's ground truth, with the canaries' estimates beside it.

    python benchmarks/demo_truth.py WORKSPACE WEB

Swapped texts: among the fetched web pairs with an ordinary image and a descriptive English text (clean or swapped), a
pair is flagged where none of its web texts (alt, caption) was kept by the text match, or a score rule dropped it.
Duplicates: a planted copy is found where it stands in a group with its original (or another copy of it); a false merge
is a pair in a group whose leader shows another scene. Forbidden: requests in the server's log below a forbidden folder,
for a page's or an image's opt-out a published pair.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from filters.canary_figures import wilson
from pairs.shard import ShardRef, list_shards
from pairs.workspace import Workspace

NO_MATCH = ("swapped",)
FORBIDDEN = ("robots_forbidden", "noai_page", "noai_header")


def truth_of(web: Path) -> dict[str, dict[str, Any]]:
    return {row["url_key"]: row for row in pq.read_table(web / "truth/truth.parquet").to_pylist()}


def rows(
    workspace: Workspace, refs: list[ShardRef], selection: str, scores: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Each pair's row with its verdict and its duplicate groups."""
    store = workspace.store
    for ref in refs:
        pair = store.read_table(ref.table, ["uid", "url_key", "url", "texts"]).to_pylist()
        verdict = store.read_table(ref.beside(selection)).to_pylist()
        groups = {name: store.read_table(ref.beside(scores[name]), ["group"])["group"].to_pylist()
                  for name in ("exact_duplicates", "near_duplicates") if name in scores}  # fmt: skip
        for i, row in enumerate(pair):
            yield row | {"verdict": verdict[i]} | {name: values[i] for name, values in groups.items()}


def flagged(row: dict[str, Any]) -> bool:
    """Whether no text of the web was kept for this image (whatever became of a synthetic one)."""
    verdict = row["verdict"]
    texts = verdict["texts"] or []
    return not any(text["kind"] in ("alt", "caption") for text in texts)


def swapped(found: list[dict[str, Any]], truth: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Recall and precision of the swapped texts among clean and swapped ones."""
    mine = [(row, truth[row["url_key"]]["defects"]) for row in found if row["url_key"] in truth]
    population = [(row, "swapped" in defects) for row, defects in mine if set(defects) <= {"swapped"}]
    hits = sum(flagged(row) for row, bad in population if bad)
    wrong = sum(flagged(row) for row, bad in population if not bad)
    bad = sum(b for _, b in population)
    return {
        "pairs": len(population),
        "swapped": bad,
        "recall": wilson(hits, bad),
        "precision": wilson(hits, hits + wrong),
        "false_drops": wilson(wrong, len(population) - bad),
    }


def duplicates(found: list[dict[str, Any]], truth: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Recall of planted copies, and false merges among all pairs, for bytes and for look-alikes."""
    by_uid = {row["uid"]: truth[row["url_key"]] for row in found if row["url_key"] in truth}
    by_url = {facts["url"]: uid for uid, facts in by_uid.items()}
    group = {row["uid"]: row for row in found}
    told = {}
    for kind, defect in (("exact_duplicates", "exact_duplicate"), ("near_duplicates", "near_duplicate")):
        planted = [(u, by_url[f["duplicate_of"]]) for u, f in by_uid.items()
                   if defect in f["defects"] and f["duplicate_of"] in by_url]  # fmt: skip
        hits = sum(
            group[copy][kind] is not None and group[copy][kind] == group[source][kind] for copy, source in planted
        )
        merged = [(u, row[kind]) for u, row in group.items() if row[kind] not in (None, u) and u in by_uid]
        wrong = sum(lead not in by_uid or by_uid[u]["facts"] != by_uid[lead]["facts"] for u, lead in merged)
        told[kind] = {
            "planted": len(planted),
            "recall": wilson(hits, len(planted)),
            "false_merges": wilson(wrong, len(by_uid)),
        }
    return told


def forbidden(web: Path, found: list[dict[str, Any]], truth: dict[str, dict[str, Any]]) -> dict[str, int]:
    """What should never have been asked for or kept."""
    log = [json.loads(line) for line in (web / "truth/access.jsonl").read_text().splitlines()]
    refused = {(f["host"], "/" + f["url"].split("/", 3)[3]) for f in truth.values()
               if {"robots_forbidden", "noai_page"} & set(f["defects"])}  # fmt: skip
    return {
        "requests": len(log),
        "requests for forbidden images": sum((line["host"], line["path"]) in refused for line in log),
        "requests below /private/": sum(line["path"].startswith("/private/") for line in log),
        "published pairs that opted out": sum(bool(set(FORBIDDEN) & set(truth[r["url_key"]]["defects"])) for r in found
                                              if r["url_key"] in truth),
    }  # fmt: skip


def measure(root: str, web: Path) -> list[dict[str, Any]]:
    """One entry per round of the latest run in the workspace."""
    workspace, truth = Workspace.open(root), truth_of(web)
    run = workspace.store.folders("runs")[-1]
    entries = []
    for path in workspace.store.files(f"runs/{run}", "curation.json"):
        curated = json.loads(workspace.store.read(path))
        refs = [ref for ref in list_shards(workspace.store, "pairs") if ref.group.startswith("web-")]
        found = list(rows(workspace, refs, curated["selection"], curated["scores"]))
        canaries = {name: facts["rules"][-1] for name, facts in curated["canaries"]["defects"].items()}
        entries.append(
            {"round": path.split("/")[2], "swapped": swapped(found, truth), **duplicates(found, truth)}
            | {"canaries": canaries, "forbidden": forbidden(web, found, truth)}
        )
    return entries


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace")
    parser.add_argument("web", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.workspace, arguments.web), indent=1))
