"""Pairs whose images mean the same: embeddings at a small cosine distance from a leader, searched cluster by cluster.

SemDeDup (arXiv 2303.09540): spherical k-means cuts the corpus into clusters of about `cluster_rows`, and only pairs of
one cluster are compared; near ones that lie in two clusters are missed. Each pair in turn (increment, trusted first,
uid) joins the earliest leader within `epsilon`, or leads. SemDeDup keeps what is farthest from the centroid, but that
changes with every pair that is added. Centroids are trained once, lie beside the tables, and are trained again only for
an increment with which the corpus has grown eightfold; earlier answers stay.

Shards are assigned to clusters on the workers, spilled in ranges of clusters, and these solved one by one: a process
holds a range (50,000 rows, or its largest cluster: 1 kB a row of 512 numbers) and blocks of products. Products in fp32
that come within their error of the threshold are computed again in float64, so neither threads nor blocks nor workers
change an answer. Null, zero and infinite embeddings have no group.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.base import Reducer
from filters.columns import one_chunk
from filters.kmeans import SAMPLE, assigned, cosine, product, train, unit, vectors
from filters.leaders import Ask, MakeIndex, Pairs, leaders, scatter, turns
from filters.parts import Part, Work
from pairs.errors import PairmillError
from pairs.store import Store

RANGE_ROWS = 50_000
BLOCK = 2048
MARGIN = 1e-4  # more than the error of an fp32 product of two unit vectors of some thousand numbers
GROWTH = 8  # centroids are trained again when there are so many times more rows
SPILL = ".tmp-spill"  # swept like every unfinished write


@dataclass(frozen=True)
class SemanticDuplicates(Reducer):
    """`group`: uid of the earliest leader with a cosine above 1 - `epsilon`; `distance`: 1 - cosine to it, from 0 (the
    leader's) to below `epsilon`."""

    embedding: str = "clip.image"  # a column of lists of numbers
    epsilon: float = 0.03
    cluster_rows: int = 1000  # rows of a cluster in the mean

    columns = {"group": pa.string(), "distance": pa.float32()}  # type: ignore[assignment]
    takes = {"embedding": pa.list_(pa.float32())}

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.embedding,)

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1 or self.cluster_rows < 1:
            raise PairmillError(
                expected="semantic_duplicates.epsilon between 0 and 1, and cluster_rows of 1 or more",
                found=f"{self.epsilon} and {self.cluster_rows}",
                remedy="0.03 joins what looks alike, 0.1 what shows the like; 1000 rows a cluster suit any corpus",
            )

    def reduce_parts(self, existing: Sequence[Part], new: Sequence[Part], work: Work) -> pa.Table:
        every, folder = [*existing, *new], f"{work.folder}/{SPILL}"
        sizes = [part.store.read_table(part.ref.table, ["uid"]).num_rows for part in every]
        centroids_KD = self._centroids(every, sum(sizes), work)
        ranges = max(1, min(sum(sizes) // RANGE_ROWS, len(centroids_KD)))
        work.store.delete(folder, recursive=True)
        items = [(part, number, f"{folder}/{number:05d}.arrow") for number, part in enumerate(every)]
        work.map(partial(_spill, self.embedding, centroids_KD, ranges), items)
        paths = [path for _, _, path in items]
        solve = partial(_solve, work.store, paths[: len(existing)], paths[len(existing) :], self.epsilon)
        found = pa.concat_tables(work.map(solve, list(range(ranges))))
        work.store.delete(folder, recursive=True)
        starts = np.cumsum([0, *sizes])
        place = starts[found["part"].to_numpy()] + found["row"].to_numpy() - starts[len(existing)]
        answers = {name: one_chunk(found[name]) for name in self.columns}
        return scatter(sum(sizes[len(existing) :]), place, answers)

    def query_parts(
        self, corpus: Sequence[Part], queries: Sequence[Part], exclude: Sequence[str | None], work: Work
    ) -> pa.Table:
        """A row that is left out is represented by the members of its group, under the group's name."""
        column = pa.concat_tables([part.load() for part in queries])[self.embedding]
        vectors_QD, known = vectors(column, self.embedding)
        left_out = [uid for uid, there in zip(exclude, known, strict=True) if there]
        best: dict[int, tuple[Any, ...]] = {}
        led_by_none = {uid for part in corpus for uid in part.without}.difference(exclude)
        if (kept := _kept(work)) and len(vectors_QD):
            centroids_KD = _read(work.store, kept[-1][2])
            asking = (vectors_QD, assigned(vectors_QD, centroids_KD))
            hits = partial(_hits, self.embedding, self.epsilon, centroids_KD, *asking)
            for found in work.map(hits, corpus):
                for query, order, group, far in found:
                    uid, without = order[-1], left_out[query]
                    if uid != without and (group in (uid, without) or group in led_by_none):
                        best[query] = min(best.get(query, (order, group, far)), (order, group, far))
        told = [best.get(query, (None, None, None)) for query in range(len(vectors_QD))]
        answers = {"group": pa.array([one[1] for one in told], pa.string())}
        answers |= {"distance": pa.array([one[2] for one in told], pa.float32())}
        return scatter(len(known), np.flatnonzero(known), answers)

    def _centroids(self, some: Sequence[Part], total: int, work: Work) -> np.ndarray:
        """(K, D) fp32: those in force, or newly trained ones, which are published first; K is 0 without embeddings."""
        kept = [one for one in _kept(work) if one[0] <= work.batch]
        if kept and (kept[-1][0] == work.batch or total < GROWTH * kept[-1][1]):
            return _read(work.store, kept[-1][2])
        clusters = max(1, round(total / self.cluster_rows))
        take = partial(_sample, self.embedding, min(1.0, min(256 * clusters, SAMPLE) / max(total, 1)))
        sample = [part_ND for part_ND in work.map(take, some) if len(part_ND)]
        if not sample:
            return np.zeros((0, 1), np.float32)
        centroids_KD: np.ndarray = replace(work, engine="inline").map(
            partial(train, clusters), [np.concatenate(sample)]
        )[0]
        with work.store.writing(f"{work.folder}/centroids-{work.batch:05d}-{total}.npy") as file:
            np.save(file, centroids_KD)
        return centroids_KD


def _kept(work: Work) -> list[tuple[int, int, str]]:
    """The centroids there are: the batch and the number of rows that they were trained for, and the path."""
    paths = [path for path in work.store.files(work.folder, ".npy") if "/centroids-" in path]
    names = [path.rsplit("centroids-", 1)[1].removesuffix(".npy").split("-") for path in paths]
    return sorted((int(batch), int(total), path) for (batch, total), path in zip(names, paths, strict=True))


def _read(store: Store, path: str) -> np.ndarray:
    with store.fs.open(store.full(path), "rb") as file:
        found: np.ndarray = np.load(file, allow_pickle=False)
    return found


def _sample(embedding: str, share: float, part: Part) -> np.ndarray:
    """The `share` of the part's embeddings whose uids are smallest; uids are hashes, so it is a choice by chance."""
    table = part.load()
    vectors_ND, known = vectors(table[embedding], embedding)
    order = pc.sort_indices(table["uid"].filter(pa.array(known))).to_numpy()
    return vectors_ND[order[: int(np.ceil(share * len(order)))]]


def _spill(embedding: str, centroids_KD: np.ndarray, ranges: int, item: tuple[Part, int, str]) -> None:
    """Writes the part's rows with their clusters, a record batch for each range of clusters."""
    part, number, path = item
    table = part.load()
    vectors_ND, known = vectors(table[embedding], embedding)
    if not len(vectors_ND):
        vectors_ND = np.zeros((0, centroids_KD.shape[1]), np.float16)
    if vectors_ND.shape[1] != centroids_KD.shape[1]:
        raise PairmillError(
            expected=f"{centroids_KD.shape[1]} numbers in {embedding}, as in the rows that the clusters were made of",
            found=f"{vectors_ND.shape[1]} in {part.ref.table}",
            remedy="name a column that one model has made",
        )
    cluster_N = assigned(vectors_ND, centroids_KD)
    order = np.argsort(cluster_N, kind="stable")
    rows = np.flatnonzero(known)[order]
    group = table["group"] if "group" in table.column_names else table["uid"]  # what a row is called by
    kept = table.select(["uid", "increment", "trusted"]).append_column("group", group).take(pa.array(rows))
    data = pa.py_buffer(np.ascontiguousarray(vectors_ND[order]))
    vector = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * vectors_ND.shape[1]), len(rows), [None, data])
    added = {"part": np.full(len(rows), number, np.int64), "row": rows, "cluster": cluster_N[order], "vector": vector}
    for name, values in added.items():
        kept = kept.append_column(name, pa.array(values) if isinstance(values, np.ndarray) else values)
    edges = np.searchsorted(cluster_N[order].astype(np.int64) * ranges // max(len(centroids_KD), 1), range(ranges + 1))
    whole = pa.record_batch([one_chunk(column) for column in kept.columns], schema=kept.schema)
    with part.store.writing(path) as file, pa.ipc.new_file(file, kept.schema) as out:
        for start, end in pairwise(edges.tolist()):
            out.write_batch(whole.slice(start, end - start))


def _solve(store: Store, old: list[str], new: list[str], epsilon: float, number: int) -> pa.Table:
    """Answers the new rows of one range of clusters: part, row, group, distance."""
    asking = _range(store, new, number)
    before = _range(store, old, number) if old else asking.slice(0, 0)
    turn, both = turns(before, asking), pa.concat_tables([before, asking])
    vectors_ND = _unpacked(both["vector"])  # never taken as a whole: a cluster may hold most of the memory
    rows = both.drop_columns(["vector"]).take(pa.array(turn))
    lead = np.arange(len(turn))
    cluster_N = rows["cluster"].to_numpy()
    order = np.argsort(cluster_N, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(cluster_N[order])) + 1):
        known = int((turn[members] < before.num_rows).sum())
        lead[members] = members[cluster_leaders(vectors_ND, turn[members], known, epsilon)]
    fresh = np.flatnonzero(turn >= before.num_rows)
    far = np.maximum(1 - cosine(vectors_ND, vectors_ND, turn[fresh], turn[lead[fresh]]), 0)
    far[lead[fresh] == fresh] = 0
    told = rows.select(["part", "row"]).take(pa.array(fresh))
    told = told.append_column("group", rows["group"].take(pa.array(lead[fresh])))
    return told.append_column("distance", pa.array(far, pa.float32()))


def _range(store: Store, paths: list[str], number: int) -> pa.Table:
    batches = []
    for path in paths:
        file = pa.memory_map(store.full(path)) if store.local else store.fs.open(store.full(path))
        with file, pa.ipc.open_file(file) as reader:
            batches.append(reader.get_batch(number))
    return pa.Table.from_batches(batches)


def _unpacked(column: pa.ChunkedArray) -> np.ndarray:
    """(N, D) fp16 from fixed-size binary values."""
    flat, width = one_chunk(column), column.type.byte_width
    data = np.frombuffer(flat.buffers()[1], np.uint8)[flat.offset * width : (flat.offset + len(flat)) * width]
    return data.view(np.float16).reshape(len(flat), width // 2)


def cluster_leaders(vectors_ND: np.ndarray, members: np.ndarray, known: int, epsilon: float) -> np.ndarray:
    """For each of the `members` (rows) of one cluster the place among them of its leader; the first `known` lead. Equal
    vectors are asked once."""
    seen: dict[bytes, int] = {}
    digests = (hashlib.blake2b(vectors_ND[row].tobytes(), digest_size=16).digest() for row in members)
    first = np.array([seen.setdefault(digest, place) for place, digest in enumerate(digests)], np.int64)
    first[:known] = np.arange(known)
    places = np.unique(first)
    found = leaders(len(places), known, near_index(vectors_ND, members[places], epsilon), BLOCK)
    return places[found[np.searchsorted(places, first)]]


def near_index(vectors_ND: np.ndarray, members: np.ndarray, epsilon: float) -> MakeIndex:
    """Answers which of the `members` have a cosine above 1 - `epsilon`, from blocks of products."""

    def index(rows: np.ndarray) -> Ask:
        def ask(asking: np.ndarray) -> Pairs:
            unit_AD = unit(vectors_ND[members[asking]])
            for start in range(0, len(rows) if len(asking) else 0, BLOCK):
                some = members[rows[start : start + BLOCK]]
                product_AB = product(unit_AD, unit(vectors_ND[some]))
                place, row = np.nonzero(product_AB > 1 - epsilon - MARGIN)
                near = product_AB[place, row] > 1 - epsilon + MARGIN
                close = np.flatnonzero(~near)
                told = cosine(vectors_ND, vectors_ND, members[asking[place[close]]], some[row[close]])
                near[close] = told > 1 - epsilon
                yield place[near], start + row[near]

        return ask

    return index


def _hits(
    embedding: str, epsilon: float, centroids_KD: np.ndarray, vectors_QD: np.ndarray, cluster_Q: np.ndarray, part: Part
) -> list[tuple[int, tuple[Any, ...], str, float]]:
    """What of the part is near a query in the query's cluster: query, place in the order, group, distance."""
    table = part.load()
    vectors_ND, known = vectors(table[embedding], embedding)
    if not len(vectors_ND):
        return []
    rows, found = table.filter(pa.array(known)), []
    cluster_N, both_ND = assigned(vectors_ND, centroids_KD), np.concatenate([vectors_QD, vectors_ND])
    index = near_index(both_ND, np.arange(len(both_ND)), epsilon)
    for place, row in _by_cluster(index, cluster_Q, cluster_N):
        far = np.maximum(1 - cosine(vectors_QD, vectors_ND, place, row), 0).tolist()
        told = rows.select(["increment", "trusted", "uid", "group"]).take(pa.array(row)).to_pylist()
        for query, one, away in zip(place.tolist(), told, far, strict=True):
            order = (one["increment"], not one["trusted"], one["uid"])
            found.append((query, order, one["group"], away))
    return found


def _by_cluster(index: MakeIndex, cluster_Q: np.ndarray, cluster_N: np.ndarray) -> Pairs:
    """What lies near of each query in its own cluster (query, row), of an index of the queries and then the rows."""
    for cluster in np.intersect1d(cluster_Q, cluster_N):
        queries, rows = np.flatnonzero(cluster_Q == cluster), np.flatnonzero(cluster_N == cluster)
        for place, row in index(len(cluster_Q) + rows)(queries):
            yield queries[place], rows[row]
