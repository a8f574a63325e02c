"""A curation with every kind of filter that loads a model's head and with all reducers, against plain recomputation."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pairs.shard import list_shards
from pairs.store import Store
from pipelines import stages
from pipelines.console import Console
from pipelines.run import Run, open_run
from tests.filters.weights import clip_folder, colour_classifier, probe_head
from tests.pipelines import flow

EPSILON, ALIKE, OFTEN = 0.001, 0.6, 2
LABELS = ["red", "green", "blue"]


def recipe(root: Path) -> dict[str, Any]:
    for name in ("clip", "probe", "colour"):
        (root / name).mkdir()
    return {
        "name": "curation",
        "sources": {"web": {"kind": "folder", "path": str(root / "web")}},
        "fetch": {"side_px": 64, "format": "png", "shard_pairs": 8},
        "filters": {
            "image_stats": {},
            "image_hash": {},
            "clip": clip_folder(root / "clip"),
            "aesthetic": {"kind": "probe", **probe_head(root / "probe")},
            "colour": {"kind": "image_classifier", **colour_classifier(root / "colour")},
            "nsfw": {"kind": "image_classifier", "model": "open_nsfw"},
        },
        "reducers": {
            "exact_duplicates": {},
            "near_duplicates": {},
            "semantic_duplicates": {"epsilon": EPSILON},
            "text_duplicates": {"min_jaccard": ALIKE},
            "text_frequency": {},
        },
        "keep": [
            {"column": "aesthetic.value", "top_fraction": 0.8},
            {"column": "colour.labels", "over": "any", "in": ["blue", "green"]},
            {"column": "nsfw.probability", "max": 0.9, "quarantine": True},
            {"column": "text_frequency.rank", "max": OFTEN - 1},
            {"one_per": "exact_duplicates.group"},
            {"one_per": "semantic_duplicates.group", "best": "clip.cosine"},
        ],
        "canaries": {"per_defect": 0},
        "engine": "inline",
    }


def curate(root: Path, new: bool = False) -> Run:
    run = open_run(root / "recipe.yaml", workspace=str(root / "workspace"), console=Console(True), new=new)
    with run.workspace.lock():
        stages.crawl(run)
        stages.fetch(run)
        stages.curate(run, 1, {"name": "none", "models": {}})
        stages.report(run)
    return run


def columns(store: Store, folder: str) -> dict[str, list[Any]]:
    """All rows of all shards."""
    tables = [store.read_table(ref.table).to_pydict() for ref in list_shards(store, folder)]
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def scores(store: Store, name: str) -> dict[str, list[Any]]:
    (folder,) = (f for f in store.folders("scores") if f.startswith(f"{name}-"))
    return columns(store, f"scores/{folder}")


@pytest.mark.timeout(180)
def test_a_selection_by_heads_classifiers_and_groups_is_what_plain_code_makes_of_it(tmp_path: Path) -> None:
    flow.draw_folder(tmp_path / "web", 24)
    for i in range(3):  # the bytes of others under another text
        (tmp_path / f"web/copy{i}.png").write_bytes(flow.drawing(i))
        (tmp_path / f"web/copy{i}.txt").write_text(f"number {i} once more")
    flow.write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path))
    run = curate(tmp_path)
    store = run.workspace.store
    pairs, clip = columns(store, "pairs"), scores(store, "clip")
    uids = pairs["uid"]
    assert len(uids) == 27 and clip["uid"] == uids

    image = np.array(clip["image"], np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    weights = load_file(tmp_path / "probe/head.safetensors")
    hidden = torch.relu(torch.from_numpy(image) @ weights["0.weight"].T + weights["0.bias"])
    value = torch.sigmoid(hidden @ weights["2.weight"].T + weights["2.bias"])[:, 0].numpy()
    assert scores(store, "aesthetic")["value"] == pytest.approx(value.tolist(), abs=1e-3)
    stored = np.array(scores(store, "aesthetic")["value"])
    keep = stored >= np.sort(stored)[::-1][round(0.8 * 27) - 1]

    labels = scores(store, "colour")["labels"]
    keep &= np.array([bool({"blue", "green"} & set(row)) for row in labels])
    keep &= np.array(scores(store, "nsfw")["probability"]) <= 0.9
    met = Counter[str]()
    ranks = {}
    for row in sorted(range(27), key=uids.__getitem__):
        ranks[row] = met[pairs["text"][row]]
        met[pairs["text"][row]] += 1
    assert scores(store, "text_frequency")["rank"] == [ranks[row] for row in range(27)]
    assert max(ranks.values()) > 0, "no text is met twice"
    keep &= np.array([ranks[row] < OFTEN for row in range(27)])

    near = image @ image.T > 1 - EPSILON
    leader: dict[int, int] = {}
    for row in sorted(range(27), key=uids.__getitem__):
        mine = next((other for other in leader if leader[other] == other and near[row, other]), row)
        leader[row] = mine
    assert scores(store, "semantic_duplicates")["group"] == [uids[leader[row]] for row in range(27)]
    exact = scores(store, "exact_duplicates")["group"]
    assert len(set(exact)) == 24 and len(set(leader.values())) < 24

    cosine = [max(values) if isinstance(values, list) else values for values in clip["cosine"]]
    left = [row for row in range(27) if keep[row]]
    left = [row for row in left if uids[row] == min(uids[r] for r in left if exact[r] == exact[row])]
    expected = set()
    for group in {leader[row] for row in left}:
        members = [row for row in left if leader[row] == group]
        top = max(cosine[row] for row in members)
        expected.add(min(uids[row] for row in members if cosine[row] == top))
    verdicts = columns(store, "selections")
    kept = {uid for uid, keeps in zip(verdicts["uid"], verdicts["kept"], strict=True) if keeps}
    assert kept == expected and 4 < len(kept) < 20
    told = run.read("report.json")["rounds"][0]
    assert told["adds_up"] and {row["filter"] for row in told["filters"]} >= {"aesthetic", "colour", "nsfw"}

    before = {path: store.read(path) for path in store.files("scores") if path.endswith(".parquet")}
    flow.draw_folder(tmp_path / "web", 8, first=40)
    later = curate(tmp_path, new=True)
    assert {path: store.read(path) for path in before} == before
    assert len(columns(store, "pairs")["uid"]) == 35 and later.folder != run.folder
