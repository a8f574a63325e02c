"""A shard: a WebDataset tar and its Parquet table, the unit of work, of failure and of resumption.

The tar is published first, the table last, so that a table that exists is complete. The table's metadata
records the tar's size and sha256; its rows record each member's offset, so that one pair is one range request.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pairs.errors import PairmillError
from pairs.identity import sha256_hex
from pairs.schemas import PAIRS, TRAINING
from pairs.store import Store, table_metadata
from pairs.tar import Member, TarWriter, read_members

JSON_FIELDS: tuple[str, ...] = ("uid", "url_key", "url", "texts", "page", "license", "source_uid", "sha256", "exif")
JSON_FIELDS += ("width", "height", "original_width", "original_height", "colour", "source", "increment")
MEMBERS = ("image", "text", "json")
KEPT = ("uid", "url_key", "source", "increment", "trusted")  # of a forgotten row: none of it is the pair's content


@dataclass(frozen=True, order=True)
class ShardRef:
    """Names a shard: `folder` is `<kind>/<group>/<increment>`, for example `pairs/web-0123456789ab/0000`."""

    folder: str
    index: int

    @property
    def tar(self) -> str:
        return f"{self.folder}/{self.index:05d}.tar"

    @property
    def table(self) -> str:
        return f"{self.folder}/{self.index:05d}.parquet"

    @property
    def group(self) -> str:
        """`<source>-<fingerprint>`."""
        return self.folder.split("/")[1]

    @property
    def increment(self) -> str:
        return self.folder.rsplit("/", 1)[1]

    def beside(self, prefix: str) -> str:
        """The path of this shard's table below another folder: `<prefix>/<group>/<increment>/00000.parquet`."""
        return f"{prefix}/{self.group}/{self.increment}/{self.index:05d}.parquet"


def shard_at(path: str) -> ShardRef:
    """The shard whose table is at `path`; another name among them is refused."""
    folder, _, name = path.removesuffix(".parquet").rpartition("/")
    if not name.isdecimal() or folder.count("/") < 2:
        raise PairmillError(
            expected="a table named like KIND/GROUP/INCREMENT/00000.parquet", found=path, remedy="move it away"
        )
    return ShardRef(folder, int(name))


def list_shards(store: Store, prefix: str) -> list[ShardRef]:
    """The complete shards below `prefix`, in order of group, increment and index."""
    return sorted(map(shard_at, store.files(prefix, ".parquet")))


def cuts(store: Store, ref: ShardRef, rows: int) -> list[str]:
    """With which increment each row of a pair shard was cut; another than the shard's own where `compact` merged it."""
    told = table_metadata(store.read_table(ref.table, ["uid"])) if "-" in ref.increment else {}
    names = told["cuts"].split() if told else [ref.increment]
    return [names[int(place)] for place in told["cut_of"].split()] if told else names * rows


def write_shard(store: Store, ref: ShardRef, rows: Iterable[tuple[dict[str, object], bytes]], schema: pa.Schema) -> int:
    """Publishes a shard of (row, encoded image); a row has `schema`'s fields but for the offsets. Returns the count."""

    def add(writer: TarWriter) -> Iterator[dict[str, object]]:
        for row, image in rows:
            yield row | {"key": row["uid"]} | _offsets(_add_pair(writer, row, image))

    return _publish(store, ref, schema, add, {})


def check_tar(store: Store, ref: ShardRef, table: pa.Table) -> None:
    """Refuses a tar that isn't the one its table records: its copy would pass for sound."""
    if sha256_hex(store.read(ref.tar)) != table_metadata(table).get("tar_sha256"):
        raise PairmillError(
            expected=f"the tar that {ref.table} records in {ref.tar}",
            found="another sha256",
            remedy="run `pairmill verify` on the workspace, and mend what it names",
        )


def copy_shard(
    store: Store, ref: ShardRef, rows: Iterable[tuple[dict[str, Any], ShardRef]], facts: dict[str, str]
) -> None:
    """Publishes a shard of rows of other shards of its kind, each with the shard it lies in: members byte for byte,
    forgotten rows as they are. `facts` go into the table's metadata."""
    schema = schema_of(ref)

    def add(writer: TarWriter) -> Iterator[dict[str, object]]:
        for row, origin in rows:
            yield row | (_offsets(_copy(writer, store, row, origin)) if row["status"] == "ok" else {})

    _publish(store, ref, schema, add, facts)


def schema_of(ref: ShardRef) -> pa.Schema:
    """What the table of a shard holds."""
    return TRAINING if ref.folder.startswith("shards/") else PAIRS


def _copy(writer: TarWriter, store: Store, row: dict[str, Any], origin: ShardRef) -> list[Member]:
    """Copies a pair's members from the tar of `origin`: neighbours, so one range request reads them."""
    start, end = row["image_offset"], row["json_offset"] + row["json_size"]
    data = store.read(origin.tar, start, end - start)
    copies = []
    for name, ext in zip(MEMBERS, (row["image_ext"], "txt", "json"), strict=True):
        at = row[f"{name}_offset"] - start
        copies.append(writer.add(row["uid"], ext, data[at : at + row[f"{name}_size"]]))
    return copies


def _publish(
    store: Store,
    ref: ShardRef,
    schema: pa.Schema,
    add: Callable[[TarWriter], Iterator[dict[str, object]]],
    facts: dict[str, str],
) -> int:
    """Tar first, table last; `add` writes the members of each row that it yields."""
    with store.writing(ref.tar) as file:
        writer = TarWriter(file)
        done = list(add(writer))
        writer.close()
    metadata = {"tar_size": str(writer.size), "tar_sha256": writer.sha256, "rows": str(len(done))} | facts
    store.write_table(ref.table, pa.Table.from_pylist(done, schema=schema), metadata)
    return len(done)


def _add_pair(writer: TarWriter, row: dict[str, object], image: bytes) -> list[Member]:
    facts = {name: row[name] for name in JSON_FIELDS if row.get(name) is not None}
    key, text = str(row["uid"]), str(row["text"] or "")
    blob = json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
    parts = ((str(row["image_ext"]), image), ("txt", text.encode("utf-8", "replace")), ("json", blob))
    return [writer.add(key, ext, data) for ext, data in parts]


def _offsets(members: list[Member]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, member in zip(MEMBERS, members, strict=True):
        found |= {f"{name}_offset": member.offset, f"{name}_size": member.size}
    return found


def rewrite_shard(store: Store, ref: ShardRef, gone: Collection[str]) -> int:
    """Takes the pairs `gone` (uids) out of a shard: its tar is written without them, their rows stay at their places,
    `forgotten` and blank but for `KEPT`. Members are found by name, so that what was killed between tar and table is
    ended by doing it again. Returns how many living rows it blanked; with none it writes nothing."""
    table = store.read_table(ref.table)
    rows = table.to_pylist()
    meant = sum(row["status"] == "ok" and row["uid"] in gone for row in rows)
    if not meant:
        return 0
    data, members = store.read(ref.tar), dict[str, list[Member]]()
    for member in read_members(data, ref.tar):
        members.setdefault(member.key, []).append(member)
    done = []
    with store.writing(ref.tar) as file:
        writer = TarWriter(file)
        for row in rows:
            if row["status"] != "ok" or row["uid"] in gone:
                done.append({name: row.get(name) if name in KEPT else None for name in row} | {"status": "forgotten"})
                continue
            parts = members.get(row["uid"], [])
            if len(parts) != len(MEMBERS):
                raise PairmillError(
                    expected=f"{len(MEMBERS)} members of {row['uid']} in {ref.tar}",
                    found=str(len(parts)),
                    remedy=f"delete {ref.table} and {ref.tar}, run the recipe again, then this command",
                )
            copies = [writer.add(m.key, m.ext, data[m.offset : m.offset + m.size]) for m in parts]
            done.append(row | _offsets(copies))
        writer.close()
    metadata = table_metadata(table) | {"tar_size": str(writer.size), "tar_sha256": writer.sha256}
    store.write_table(ref.table, pa.Table.from_pylist(done, schema=table.schema), metadata)
    return meant


@dataclass(frozen=True)
class Shard:
    """A shard in memory: its table, and its tar's bytes."""

    ref: ShardRef
    table: pa.Table
    tar: bytes

    def images(self) -> Iterator[bytes | None]:
        """The encoded image of each row, in order; None where the pair is forgotten."""
        columns = [self.table[name].to_pylist() for name in ("image_offset", "image_size", "status")]
        for offset, size, status in zip(*columns, strict=True):
            yield None if status == "forgotten" else self.tar[offset : offset + size]


def read_shard(store: Store, ref: ShardRef) -> Shard:
    """Reads a shard whole; a tar whose size isn't the recorded one is refused."""
    table = store.read_table(ref.table)
    tar = store.read(ref.tar) if store.has(ref.tar) else None
    recorded = table_metadata(table).get("tar_size")
    if tar is None or recorded != str(len(tar)):
        raise PairmillError(
            expected=f"{recorded} bytes in {ref.tar}",
            found="no such file" if tar is None else f"{len(tar)} bytes",
            remedy=f"delete {ref.table} and {ref.tar}, then run the same command again; the shard is made anew",
        )
    return Shard(ref, table, tar)
