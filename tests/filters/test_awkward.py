"""What comes sooner or later: a caption of 100 MB, embeddings of NaN, a column that is all null, a tar that was cut.
Each is measured, null and counted, or a clear error."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from filters.base import PIXELS, Batch, Filter, needed_filters
from filters.clip import Clip
from filters.columns import load_frame
from filters.engine import plan, score_shards
from filters.lookup import names
from filters.score_tables import told_by_tables
from filters.selection import select
from pairs.errors import PairmillError
from pairs.rules import Rule, TextsSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import Store
from tests.filters.scoring import fresh_folder, small
from tests.filters.shards import FOLDER, pair, write_shards
from tests.filters.weights import clip_folder

LONG = 100_000_000
READERS = [n for n in names(Filter) if {"text", "texts"} & set(small(n).needs) and not needed_filters(small(n))]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", READERS)
def test_a_caption_of_100_mb_is_measured_in_bounded_memory(name: str, tmp_path: Path) -> None:
    store, words = Store(tmp_path), "a red boat on a quiet lake "
    row, data = pair(1, text="a red boat")
    long = (words * (LONG // len(words) + 1))[:LONG]
    huge = pair(2, text=long)[0] | {"texts": [{"text": long, "kind": "alt", "language": None}]}
    ref = ShardRef(FOLDER, 0)
    write_shard(store, ref, [(row, data), (huge, data)], PAIRS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stats = score_shards(store, plan({name: small(name)}), [ref], engine="inline", workers=1).filters[name]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000, "kB"
    assert not stats.errors and stats.pairs == 2


@dataclass(frozen=True)
class Hole(Filter):
    """Nothing but null, and NaN."""

    needs = ("text",)
    columns = {"nothing": pa.float32(), "nan": pa.float32(), "vectors": pa.list_(pa.float16())}

    def score(self, batch: Batch) -> Mapping[str, Any]:
        vector = np.full(4, np.nan, np.float16)
        return {"nothing": [None] * len(batch), "nan": np.full(len(batch), np.nan), "vectors": [vector] * len(batch)}


def test_a_column_that_is_all_null_is_counted_and_passes_no_rule(tmp_path: Path) -> None:
    store = Store(tmp_path)
    refs, planned = write_shards(store), plan({"hole": Hole()})
    stats = score_shards(store, planned, refs, engine="inline", workers=1).filters["hole"]
    assert stats.nulls["nothing"] == stats.nulls["nan"] == stats.pairs == 11
    rows, nulls, errors = told_by_tables(store, planned[0].folder, refs)
    assert (rows, nulls["nan"], errors) == (13, 11, {}), "the forgotten are rows, and nobody's nulls"
    scores, shards = {"hole": planned[0].folder}, {"web": refs}
    frame = load_frame(store, shards, ["hole.nan"], scores, [])
    assert frame.table["hole.nan"].null_count == 13
    for number, limit in enumerate(({"min": 0.0}, {"top_fraction": 0.5})):
        rule = Rule(column="hole.nan", **limit)
        chosen = select(store, f"web{number}", [rule], TextsSpec(keep="first"), shards, scores, [])
        assert chosen.kept == 0


def test_a_model_that_makes_nan_leaves_null(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = fresh_folder()
    clip = Clip(**clip_folder(folder))
    file = folder / "open_clip_model.safetensors"
    broken = {name: value * np.nan if name == "visual.proj" else value for name, value in load_file(file).items()}
    save_file(broken, file)
    store = Store(tmp_path)
    refs, planned = write_shards(store, (4,)), plan({"clip": clip})
    stats = score_shards(store, planned, refs, engine="inline", workers=1).filters["clip"]
    table = store.read_table(refs[0].beside(planned[0].folder))
    assert table["image"].null_count == table["cosine"].null_count == 4
    assert table["cosines"].to_pylist() == [[None, None], [None, None], None, None]
    assert table["text"].to_pylist()[0] is not None
    assert stats.nulls == {"image": 3, "cosine": 3, "cosines": 1}


def test_a_tar_that_was_cut_is_refused_with_advice_and_texts_are_still_measured(tmp_path: Path) -> None:
    store = Store(tmp_path)
    refs = write_shards(store, (6,))
    whole = store.read(refs[0].tar)
    store.write(refs[0].tar, whole[: len(whole) // 2])
    for name in ("image_stats", "image_hash"):
        assert PIXELS in small(name).needs
        with pytest.raises(PairmillError, match=r"bytes in .*tar(.|\n)*delete"):
            score_shards(store, plan({name: small(name)}), refs, engine="inline", workers=1)
    assert not store.files("scores") and not store.files("scoring")
    score_shards(store, plan({"text_stats": small("text_stats")}), refs, engine="inline", workers=1)
    assert len(store.files("scores")) == 1
