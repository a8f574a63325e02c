"""A simulated Ray cluster of three nodes, one of which is killed while it scores: the tables are the inline run's."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest

from cluster.compute import Engine
from cluster.session import ray_session
from filters import parts
from filters.base import Batch, Filter
from filters.engine import plan, score_shards
from filters.lookup import load_reducer
from filters.reduce import run_reducers
from pairs.shard import ShardRef, list_shards
from pairs.store import Store
from tests.filters.scoring import small
from tests.filters.shards import write_shards

STORE = {"object_store_memory": 80 << 20}


@dataclass(frozen=True)
class Slow(Filter):
    """Takes its time, so that a node dies at work."""

    needs = ("text", "pixels")
    columns = {"n": pa.int32()}

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        time.sleep(0.2)
        return {"n": [None if text is None else len(text) for text in batch["text"]]}


def curate(store: Store, refs: list[ShardRef], engine: Engine, workers: int, **settings: Any) -> None:
    names = ("image_stats", "text_stats", "image_hash")
    planned = plan({"slow": Slow()} | {name: small(name) for name in names})
    score_shards(store, planned, refs, engine=engine, workers=workers, **settings)
    scores = {one.name: one.folder for one in planned}
    reducers = {name: load_reducer(name, {}) for name in ("exact_duplicates", "near_duplicates")}
    run_reducers(store, reducers, {"web": refs}, scores, [], engine, min(workers, 2))


def main() -> None:
    """Curates on a cluster and kills a node at the fourth shard; the reducers run on the two that are left. In a
    process of its own: Ray reads once in a process whether it asks for a token, and this cluster doesn't."""
    from ray.cluster_utils import Cluster

    store = Store(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False} | STORE)
    parts.SPREAD_BYTES = 0
    victim = [cluster.add_node(num_cpus=1, **STORE) for _ in range(2)][-1]
    os.environ["RAY_ADDRESS"] = cluster.address

    def kill(done: int, total: int) -> None:
        if done == 4:
            cluster.remove_node(victim, allow_graceful=False)
            print("killed a node of", total, "shards", flush=True)

    try:
        with ray_session(3), mock.patch.object(parts, "map_shards", wraps=parts.map_shards) as spread:
            curate(store, list_shards(store, "pairs"), engine="ray", workers=3, progress=kill)
            print("reduced by", {(call.kwargs["engine"], call.kwargs["workers"]) for call in spread.mock_calls})
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_that_dies_in_mid_curation_changes_no_byte(tmp_path: Path) -> None:
    inline, spread = Store(tmp_path / "inline"), Store(tmp_path / "ray")
    refs = write_shards(inline, (6,) * 15) and write_shards(spread, (6,) * 15)
    curate(inline, refs, engine="inline", workers=1)
    here = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_USAGE_STATS_ENABLED": "0"}
    here |= {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    command = [sys.executable, "-c", "from tests.filters import test_node_death as one; one.main()", spread.root]
    told = subprocess.run(command, env=here, capture_output=True, text=True)
    assert told.returncode == 0 and "killed a node of 15 shards" in told.stdout, told.stderr[-3000:]
    assert "reduced by {('ray', 2)}" in told.stdout, told.stdout
    assert inline.files("scores") == spread.files("scores") and len(inline.files("scores")) > 15 * 5
    assert [path for path in inline.files("scores") if inline.read(path) != spread.read(path)] == []
