"""A sound small workspace, written by hand: two pair shards with all that refers to them."""

import json
from typing import Any

import pyarrow as pa

from pairs.fingerprint import content_hash
from pairs.identity import canonical_url, make_uid, sha256_hex, url_key
from pairs.schemas import CANDIDATES, LEDGER, PAIRS, SELECTION, TRAINING
from pairs.shard import ShardRef, write_shard
from pairs.store import Store
from pairs.workspace import Workspace

GROUP = "web-0123456789ab"
FOLDER = f"pairs/{GROUP}/0000"


def image(i: int) -> bytes:
    """Bytes of a length of their own; no test of this floor decodes them."""
    return bytes([255, 216, 255, i % 256]) + bytes([i % 251]) * (300 + 77 * i)


def pair_row(i: int) -> dict[str, Any]:
    url = canonical_url(f"http://host{i % 2}.test/{i}.jpg")
    original = sha256_hex(image(i))
    texts = [{"text": f"a dog and {i} ducks — ½", "kind": "alt", "language": None}]
    row = {"uid": make_uid(url_key(url), original), "url_key": url_key(url), "url": url, "sha256": original}
    row |= {"text": texts[0]["text"], "texts": texts, "page": "http://host0.test/", "status": "ok"}
    return row | {"width": 64, "height": 48, "original_width": 640, "original_height": 480, "image_ext": "jpg"}


def training_row(i: int) -> dict[str, Any]:
    row = pair_row(i)
    texts = [text | {"probability": 0.75} for text in row["texts"]]
    return row | {"texts": texts, "source": "web", "increment": "0000", "trusted": False}


def fill(workspace: Workspace) -> Workspace:
    """Pairs 0..6 in two shards; candidates 0..8, of which 7 and 8 failed; scores, selection, training shard, model."""
    store = workspace.store
    for index, numbers in enumerate((range(0, 4), range(4, 7))):
        write_shard(store, ShardRef(FOLDER, index), ((pair_row(i), image(i)) for i in numbers), PAIRS)
        uids = [pair_row(i)["uid"] for i in numbers]
        scores = pa.table({"uid": uids, "words": pa.array([5] * len(uids), pa.int32())})
        store.write_table(f"scores/text_stats-aaaaaaaaaaaa/{GROUP}/0000/{index:05d}.parquet", scores)
        chosen = [{"uid": u, "kept": n > 0, "dropped_by": None if n else "words min 6"} for n, u in enumerate(uids)]
        table = pa.Table.from_pylist(chosen, schema=SELECTION)
        store.write_table(f"selections/small-bbbbbbbbbbbb/{GROUP}/0000/{index:05d}.parquet", table)
    for index, kept in enumerate(((1, 2, 3), (5, 6))):
        ref = ShardRef(f"shards/small-bbbbbbbbbbbb/{GROUP}/0000", index)
        write_shard(store, ref, ((training_row(i), image(i)) for i in kept), TRAINING)
    store.write("selections/small-bbbbbbbbbbbb/manifest.json", "{}")
    lineage = {"increments": {"web": ["0000"]}, "fetch": GROUP.removeprefix("web-")}
    store.write("runs/small-cccccccccccc-0001/lineage.json", json.dumps(lineage))
    _candidates(store)
    _model(workspace)
    workspace.bury("url_key", [url_key("http://gone.test/1.jpg")], "forget")
    return workspace


def _candidates(store: Store) -> None:
    found = sorted((pair_row(i) for i in range(9)), key=lambda row: row["url_key"])
    rows = [{name: row.get(name) for name in CANDIDATES.names} for row in found]
    store.write_table("candidates/web/0000/part-00000.parquet", pa.Table.from_pylist(rows, schema=CANDIDATES))
    ok = {pair_row(i)["url_key"]: pair_row(i)["uid"] for i in range(7)}
    tried = [{"url_key": r["url_key"], "url": r["url"], "status": "ok", "uid": ok.get(r["url_key"])} for r in found]
    tried = [row if row["uid"] else row | {"status": "permanent", "reason": "http_404"} for row in tried]
    for part, rows in enumerate((tried[:5], tried[5:])):
        table = pa.Table.from_pylist(rows, schema=LEDGER)
        store.write_table(f"ledger/{GROUP}/0000/{part:05d}.parquet", table)


def _model(workspace: Workspace) -> None:
    assert workspace.store.local
    folder = workspace.store.local / "models" / "new"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"embed_dim": 8}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    folder.rename(folder.parent / content_hash(folder))
