"""Semantic duplicates: inside a cluster the answers of brute force, whatever the blocks; what is no embedding has no
group; centroids stay until the corpus has grown eightfold."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters import semantic_duplicates
from filters.kmeans import assigned, train, vectors
from filters.leaders import MakeIndex, Pairs
from filters.lookup import load_reducer
from filters.reduce import ask, run_reducers
from filters.semantic_duplicates import SemanticDuplicates, cluster_leaders
from pairs.errors import PairmillError
from pairs.shard import ShardRef
from pairs.workspace import Workspace
from tests.filters.corpus import add, folder

SCORES = {"clip": folder("clip")}


def brute(vectors_ND: np.ndarray, known: int, epsilon: float) -> list[int]:
    """The oracle: each row joins the first leader whose cosine is above 1 - epsilon, or leads."""
    wide = vectors_ND.astype(np.float64)
    cosine = wide @ wide.T / np.linalg.norm(wide, axis=1)[:, None] / np.linalg.norm(wide, axis=1)[None, :]
    found = list(range(known))
    for row in range(known, len(wide)):
        found.append(next((i for i in range(row) if found[i] == i and cosine[i, row] > 1 - epsilon), row))
    return found


def cloud(rows: int, seed: int, width: int = 16, themes: int = 6) -> np.ndarray:
    chance = np.random.default_rng(seed)
    made = chance.normal(size=(themes, width))[chance.integers(0, themes, rows)]
    made = made + chance.uniform(0, 0.6, (rows, 1)) * chance.normal(size=(rows, width))
    made[chance.random(rows) < 0.2] = made[0]
    return made.astype(np.float16)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(0, 5), st.sampled_from([0.01, 0.05, 0.3]), st.integers(2, 50))
def test_leaders_of_a_cluster_are_those_of_brute_force(seed: int, known: int, epsilon: float, block: int) -> None:
    vectors_ND = np.unique(cloud(60, seed), axis=0) if known else cloud(60, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic_duplicates, "BLOCK", block)
        found = cluster_leaders(vectors_ND, np.arange(len(vectors_ND)), known, epsilon)
    assert found.tolist() == brute(vectors_ND, known, epsilon)


def fill(workspace: Workspace, increment: str, made: np.ndarray, index: int = 0) -> ShardRef:
    start = int(increment) * 10_000 + index * 1000
    column = pa.array(list(made), pa.list_(pa.float16()))
    return add(workspace, "web", increment, range(start, start + len(made)), {"clip": {"image": column}}, index)


def reduced(workspace: Workspace, refs: list[ShardRef], **chosen: Any) -> tuple[str, pa.Table]:
    reducers = {"semantic_duplicates": SemanticDuplicates(**chosen)}
    place = run_reducers(workspace.store, reducers, {"web": refs}, SCORES, [])["semantic_duplicates"]
    return place, pa.concat_tables([workspace.store.read_table(ref.beside(place)) for ref in refs])


def expected(workspace: Workspace, place: str, table: pa.Table, made: np.ndarray, epsilon: float) -> list[str]:
    """Brute force in each cluster, in order of uid."""
    path = next(name for name in workspace.store.files(place, ".npy"))
    cluster = assigned(made, np.load(workspace.store.full(path)))
    uid = np.array(table["uid"].to_pylist())
    group = uid.copy()
    for one in np.unique(cluster):
        rows = np.flatnonzero(cluster == one)
        rows = rows[np.argsort(uid[rows])]
        group[rows] = uid[rows[brute(made[rows], 0, epsilon)]]
    return group.tolist()


def test_inside_clusters_it_is_brute_force_over_shards_and_ranges(workspace: Workspace, monkeypatch: Any) -> None:
    monkeypatch.setattr(semantic_duplicates, "RANGE_ROWS", 100)
    made = cloud(480, 1, themes=30)
    refs = [fill(workspace, "0000", part, index) for index, part in enumerate(np.split(made, 3))]
    place, table = reduced(workspace, refs, epsilon=0.05, cluster_rows=60)
    assert len(np.load(workspace.store.full(workspace.store.files(place, ".npy")[0]))) == 8
    assert table["group"].to_pylist() == expected(workspace, place, table, made, 0.05)
    far = np.array(table["distance"].to_pylist())
    leads = np.array(table["uid"].to_pylist()) == np.array(table["group"].to_pylist())
    assert (far[leads] == 0).all() and (far[~leads] < 0.05).all() and 50 < leads.sum() < 430
    assert not [name for name in workspace.store.fs.find(workspace.store.full(place)) if "spill" in name]


def test_a_query_is_multiplied_with_its_own_cluster_alone(workspace: Workspace, monkeypatch: Any) -> None:
    """The answers are those of all queries times all rows, cut down to clusters afterwards, for a part of the work."""
    made, one = cloud(960, 1, themes=30), SemanticDuplicates(epsilon=0.05, cluster_rows=120)
    refs = [fill(workspace, "0000", part, index) for index, part in enumerate(np.split(made[:840], 2))]
    asking = [fill(workspace, "0001", made[840:])]
    place, table = reduced(workspace, refs, epsilon=0.05, cluster_rows=120)
    cells, multiply = [], semantic_duplicates.product

    def counted(left_ND: np.ndarray, right_MD: np.ndarray) -> np.ndarray:
        cells.append(len(left_ND) * len(right_MD))
        return multiply(left_ND, right_MD)

    def answers() -> pa.Table:
        cells.clear()
        scores, exclude = SCORES | {"semantic_duplicates": place}, [None, *table["group"].to_pylist()[:119]]
        given = (workspace.store, "semantic_duplicates", one, {"web": refs}, scores, [], {"canaries": asking})
        return ask(*given, exclude)[0]

    monkeypatch.setattr(semantic_duplicates, "product", counted)
    found, work = answers(), sum(cells)

    def at_once(index: MakeIndex, cluster_Q: np.ndarray, cluster_N: np.ndarray) -> Pairs:
        for query, row in index(len(cluster_Q) + np.arange(len(cluster_N)))(np.arange(len(cluster_Q))):
            same = cluster_Q[query] == cluster_N[row]
            yield query[same], row[same]

    monkeypatch.setattr(semantic_duplicates, "_by_cluster", at_once)
    assert answers().equals(found) and 0 < found["group"].null_count < 120
    assert work < sum(cells) / 3


def test_what_is_no_embedding_has_no_group(workspace: Workspace) -> None:
    made = cloud(6, 0)
    made[0], made[1], made[2, 3] = np.nan, 0, np.inf
    groups = reduced(workspace, [fill(workspace, "0000", made)])[1]["group"].to_pylist()
    assert groups[:3] == [None] * 3 and None not in groups[3:]
    nothing = reduced(workspace, [fill(workspace, "0001", made[:2])])[1]
    assert nothing["group"].null_count == 2 and nothing["distance"].null_count == 2


def test_embeddings_of_another_length_are_refused(workspace: Workspace) -> None:
    refs = [fill(workspace, "0000", cloud(5, 0)), fill(workspace, "0001", cloud(5, 0, width=8))]
    with pytest.raises(PairmillError, match="numbers"):
        reduced(workspace, refs)
    with pytest.raises(PairmillError, match="one length"):
        vectors(pa.chunked_array([[[1.0], [1.0, 2.0]]]), "clip.image")


def test_centroids_are_trained_once_until_the_corpus_has_grown(workspace: Workspace) -> None:
    made = np.split(cloud(220, 0), [20, 120])
    refs = [fill(workspace, "0000", made[0])]
    place, first = reduced(workspace, refs, epsilon=0.05)
    trained = workspace.store.files(place, ".npy")
    assert [name.rsplit("/", 1)[1] for name in trained] == ["centroids-00000-20.npy"]
    before = workspace.store.read(trained[0])
    refs.append(fill(workspace, "0001", made[1]))
    assert workspace.store.files(reduced(workspace, refs, epsilon=0.05)[0], ".npy") == trained
    refs.append(fill(workspace, "0002", made[2]))
    again, table = reduced(workspace, refs, epsilon=0.05)
    assert len(workspace.store.files(again, ".npy")) == 2 and workspace.store.read(trained[0]) == before
    assert table.slice(0, 20).equals(first)
    late = set(table["group"].to_pylist()[20:]) & set(first["uid"].to_pylist())
    assert late, "later rows join leaders of the first increment, under new centroids too"


def test_training_is_the_same_every_time() -> None:
    sample = cloud(400, 3)
    assert train(5, sample).tobytes() == train(5, sample).tobytes()
    assert len(train(500, sample)) == 10, "forty rows a cluster at least"


@pytest.mark.parametrize("chosen", [{"epsilon": 0}, {"epsilon": 1.5}, {"cluster_rows": 0}])
def test_settings_without_meaning_are_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(PairmillError, match="epsilon"):
        load_reducer("semantic_duplicates", chosen)
