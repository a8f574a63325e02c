"""Locked towers of another make as columns: features that a filter made once, read in the place of images or texts.

Nothing is run again: a filter's score tables (`scores/<filter>-<fingerprint>/…`) hold a vector for each pair, or for
each of its texts, and training reads them beside the shards, in memory as fp16 (2.6 GB for a million images of 1,280
numbers). The plan doesn't know of them: a pair without a vector is masked and counted like one whose image is damaged.
Several columns stand side by side. A text is found by its words among the pair's own, in whatever order they are kept.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pairs.errors import PairmillError
from pairs.identity import unit_hash
from pairs.pretrain import PretrainSpec, StartSpec
from pairs.shard import ShardRef
from pairs.store import Store
from training import export
from training.config import TrainConfig
from training.data import Batch, Loader, Pairs
from training.models.clip import Towers
from training.models.locked import Head, Rows, lock, put_heads
from training.packing import PackedTexts, pack_texts
from training.plan import Plan
from training.tables import pinned_table
from training.tokens import Tokeniser

MISSING = "no_features"
Vectors = dict[str, np.ndarray]  # by uid or text


@dataclass(frozen=True, eq=False)
class Columns:
    """fp16 features by tower, not finite where there are none: `image` (pairs of the plan, D), `text` (its texts, D);
    None for a tower that isn't a column."""

    image: Tensor | None
    text: Tensor | None


def read_columns(store: Store, config: TrainConfig, plan: Plan) -> Columns:
    """The columns that `config.spec.towers` names, for the plan's pairs and texts."""
    spec = config.spec
    image, text = spec.towers.image, spec.towers.text
    images: list[Vectors] = [{} for _ in image.features]
    texts: list[Vectors] = [{} for _ in text.features]
    words: dict[str, list[str]] = {}
    for pin in config.shards:
        pair = ShardRef("/".join(["pairs", *pin.folder.split("/")[-2:]]), pin.index)
        for name, into in zip(image.features, images, strict=True):
            into |= _by_uid(store, config, pair, name)
        if text.features:
            own = {uid: _texts(row) for uid, row in _rows(store, pair.table)}
            for name, into in zip(text.features, texts, strict=True):
                into |= _by_text(_by_uid(store, config, pair, name), own)
            for row in pinned_table(store, pin).select(["uid", "text", "texts"]).to_pylist():
                words[row["uid"]] = [t for t in _texts(row) if t]
    return Columns(
        _side_by_side(images, plan.uids, image, spec, "pairs") if images else None,
        _side_by_side(texts, _numbered(plan, words, spec), text, spec, "texts") if texts else None,
    )


def _texts(row: Mapping[str, Any]) -> list[str]:
    return [t["text"] for t in row["texts"] or []] or [row["text"]]


def _rows(store: Store, table: str) -> list[tuple[str, dict[str, Any]]]:
    return [(row["uid"], row) for row in store.read_table(table, ["uid", "text", "texts"]).to_pylist()]


def _by_uid(store: Store, config: TrainConfig, pair: ShardRef, name: str) -> Vectors:
    """The values of the column `name` in the table of a pair shard, nulls left out."""
    maker, _, column = name.partition(".")
    path = pair.beside(config.scores[maker])
    if not store.has(path):
        raise PairmillError(
            expected=f"the column {name} in {path}",
            found="no such table",
            remedy="run `pairmill curate` with the filter in the recipe",
        )
    table = store.read_table(path, ["uid", column])
    kind = table[column].type
    if not pa.types.is_list(kind):
        raise PairmillError(
            expected=f"a column of vectors at {name}", found=f"{kind}", remedy="name an embedding, such as clip.image"
        )
    values = zip(table["uid"].to_pylist(), _arrays(table[column]), strict=True)
    return {uid: value for uid, value in values if uid and value is not None}


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """fp16 vectors, or lists of them; None where null."""
    if pa.types.is_list(column.type.value_type):
        return [
            value and [None if v is None else np.array(v, np.float16) for v in value] for value in column.to_pylist()
        ]
    lists = column.combine_chunks()
    flat, ends = lists.values.to_numpy(zero_copy_only=False).astype(np.float16), lists.offsets.to_numpy()
    there = lists.is_valid().to_pylist()
    return [flat[a:b] if is_there else None for a, b, is_there in zip(ends, ends[1:], there, strict=False)]


def _by_text(values: Vectors, texts: Mapping[str, list[str]]) -> Vectors:
    """By text instead of by uid: a list of vectors is aligned with the pair's texts, a lone one is the first's."""
    found: Vectors = {}
    for uid, value in values.items():
        vectors = value if isinstance(value, list) else [value]
        found |= {t: v for t, v in zip(texts[uid], vectors, strict=False) if t and v is not None}
    return found


def _numbered(plan: Plan, words: Mapping[str, list[str]], spec: PretrainSpec) -> list[str]:
    """A text of each number in the plan, which were given in the order of its pairs."""
    tokeniser, found = Tokeniser(spec.model.context, spec.model.tokenizer), dict[int, str]()
    for uid in plan.uids:
        for text in words[uid]:
            found.setdefault(tokeniser.number(text), text)
    return [found[number] for number in range(len(plan.tokens.ids))]


def _side_by_side(
    columns: Sequence[Vectors], keys: Sequence[str], start: StartSpec, spec: PretrainSpec, what: str
) -> Tensor:
    """(keys, D of all columns), NaN where one of them has no value."""
    parts = []
    for name, vectors in zip(start.features, columns, strict=True):
        widths = Counter(len(vectors[key]) for key in keys if key in vectors)
        if len(widths) != 1 or 2 * widths.total() < len(keys):
            raise PairmillError(
                expected=f"vectors of one length for at least half of the {len(keys)} {what} in {name}",
                found=f"{dict(widths)} (how many of each length)",
                remedy="name a column that was made of these pairs",
            )
        nothing = np.full(next(iter(widths)), np.nan, np.float16)
        parts.append(np.stack([vectors.get(key, nothing) for key in keys]))
    if (start.residual or start.lock) and parts[-1].shape[1] != spec.model.embed_dim:
        raise PairmillError(
            expected=f"{spec.model.embed_dim} numbers in {start.features[-1]}, as pretrain.model.embed_dim says",
            found=str(parts[-1].shape[1]),
            remedy="set embed_dim to that, or leave `residual` and `lock` out",
        )
    return torch.from_numpy(np.concatenate(parts, 1))


class ColumnLoader(Loader):
    """A Loader that gives `Rows` of `columns` for the towers that are columns. Where images are, none is read,
    and pairs are spread over ranks and parts one by one, since all cost the same."""

    def __init__(self, *args: Any, columns: Columns, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.columns = columns

    def load(self, step: int) -> Batch:
        if self.columns.image is not None:
            return self._features(step)
        batch = super().load(step)
        own = self._own(self.plan.split(step, self.ranks * self.parts, self.cost))
        rows = [self._looked_up("text", part) for part in own]
        parts = tuple((images, one) for (images, _), (one, _) in zip(batch.parts, rows, strict=True))
        return self._masked(batch, parts, torch.cat([there for _, there in rows]))

    def _features(self, step: int) -> Batch:
        """A batch without images."""
        every = self.plan.rows(step)
        shares = [[every[r :: self.ranks][i :: self.parts] for i in range(self.parts)] for r in range(self.ranks)]
        same = [[r, self.plan.text(e, r)] for share in shares for part in share for e, r in part]
        parts: list[tuple[Rows, Rows | PackedTexts]] = []
        valid = []
        for own in shares[self.rank]:
            images, there = self._looked_up("image", own)
            if self.columns.text is None:
                words = [torch.from_numpy(self.plan.tokens.ids[self.plan.text(e, r)]) for e, r in own]
                parts.append((images, pack_texts(words, self.form, self.multiple)))
            else:
                texts, told = self._looked_up("text", own)
                parts.append((images, texts))
                there &= told
            valid.append(there)
        counts = tuple(sum(map(len, share)) for share in shares)
        whole = Batch((), torch.ones(counts[self.rank], dtype=torch.bool), torch.tensor(same), counts, {})
        return self._masked(whole, tuple(parts), torch.cat(valid))

    def _looked_up(self, tower: str, own: Pairs) -> tuple[Rows, Tensor]:
        """Features and whether there are any: zeros where not. What a pair's dropout is drawn from hangs on its uid."""
        values: Tensor = getattr(self.columns, tower)
        found = values[[row if tower == "image" else self.plan.text(epoch, row) for epoch, row in own]]
        there = found.isfinite().all(-1)
        chances = [unit_hash(self.plan.seed, epoch, self.plan.uids[row], tower, "head") for epoch, row in own]
        seeds = torch.tensor([int(chance * 2**53) for chance in chances])
        return Rows(found.masked_fill(~there[:, None], 0), seeds), there

    def _masked(self, batch: Batch, parts: Any, there: Tensor) -> Batch:
        lost = int((batch.valid & ~there).sum())
        told = batch.damaged | ({MISSING: lost} if lost else {})
        return dataclasses.replace(batch, parts=parts, valid=batch.valid & there, damaged=told)


def make_loader(columns: Columns | None) -> Callable[..., Loader]:
    """What makes a run's loader."""
    return functools.partial(ColumnLoader, columns=columns) if columns else Loader


def start_model(store: Store, config: TrainConfig, plan: Plan) -> tuple[Towers, Columns | None]:
    """The model as training begins it: weights given or of the seed, locked parts locked, heads on columns."""
    spec, model = config.spec, export.begin(config.spec)
    model.with_vocabulary(model.token_embedding.weight[torch.from_numpy(plan.tokens.used)])
    starts = {"image": spec.towers.image, "text": spec.towers.text}
    for tower, start in starts.items():
        if start.lock:
            lock(model, tower, start.unlocked_groups)
    if not any(start.features for start in starts.values()):
        return model, None
    columns = read_columns(store, config, plan)
    heads: dict[str, Head | None] = {}
    for tower, values in (("image", columns.image), ("text", columns.text)):
        start, heads[tower] = starts[tower], None
        if values is not None:
            whole = start.residual or start.lock
            head = Head(values.shape[1], start.hidden, spec.model.embed_dim, start.dropout, whole)
            head.fit(values)
            head.requires_grad_(not start.lock)
            heads[tower] = head
    put_heads(model, **heads)
    return model, columns
