"""Small corpora for what judges: pair shards whose images are a few bytes, and score tables given by value."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pairs.identity import held_out, make_uid, sha256_hex, url_key
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import Store
from pairs.workspace import Workspace

GROUPS = {"web": "web-0123456789ab", "clean": "clean-0123456789ab"}


def row(source: str, number: int, image: bytes, texts: Sequence[str] = ("a text",)) -> dict[str, Any]:
    """A pair; of the trusted source only numbers that aren't held out are meant (`free_numbers`)."""
    key = url_key(f"http://{source}.test/{number}.jpg")
    listed = [{"text": text, "kind": "alt", "language": None} for text in texts]
    found = dict.fromkeys(PAIRS.names) | {"uid": make_uid(key, sha256_hex(image)), "url_key": key, "status": "ok"}
    found |= {"text": texts[0] if texts else None, "texts": listed, "width": 8, "height": 8, "image_ext": "jpg"}
    return found | {"sha256": sha256_hex(image), "url": f"http://{source}.test/{number}.jpg"}


def uid_of(source: str, number: int) -> str:
    return str(row(source, number, str(number).encode())["uid"])


def numbers(count: int, held: bool = False, source: str = "clean") -> list[int]:
    """The first `count` numbers whose pairs are, or aren't, held out."""
    return [n for n in range(2000) if held_out(uid_of(source, n)) == held][:count]


def add(
    workspace: Workspace,
    source: str,
    increment: str,
    members: Sequence[int],
    scores: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    index: int = 0,
    texts: Sequence[Sequence[str]] | None = None,
) -> ShardRef:
    """Writes a shard of the pairs `members`, and score tables: filter → column → values or an Arrow array."""
    ref = ShardRef(f"pairs/{GROUPS[source]}/{increment}", index)
    images = [str(number).encode() for number in members]
    listed = texts or [["a text"]] * len(members)
    rows = [row(source, n, image, t) for n, image, t in zip(members, images, listed, strict=True)]
    write_shard(workspace.store, ref, zip(rows, images, strict=True), PAIRS)
    for name, columns in (scores or {}).items():
        table = pa.table({"uid": [r["uid"] for r in rows], **columns})
        workspace.store.write_table(ref.beside(folder(name)), table)
    return ref


def folder(name: str) -> str:
    return f"scores/{name}-aaaaaaaaaaaa"


def contents(store: Store) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {path: store.read(path) for path in store.files("")}
