"""Figures of models on what no training sees: rows for the report, kept in `evals/` by what goes in.

A model is named by its content, by role. A `clip` answers zero-shot and retrieval; a `matcher` these by its contrast
and, re-ranked, by its match head; a `captioner` writes a caption for each held-out image, by three beams as BLIP's
authors evaluate theirs, behind the prompt that it learned (one of no training here: that of the recipe's
`blip_caption`) and with the lengths of `blip_caption`. A row is {model, figure, value,
low, high, n, chance}, intervals at 95 %; what isn't a share has a `unit`, and no chance.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filters.base import Filter, fingerprint_of
from filters.lookup import load_filter
from pairs.fingerprint import content_hash, fingerprint
from pairs.identity import held_out
from pairs.pretrain import BEGINNING
from pairs.shard import ShardRef
from pipelines.models import learned_prompt, model_folder
from pipelines.run import Run

Facts = dict[str, Any]
Row = tuple[ShardRef, Facts]
Known = Mapping[str, Sequence[ShardRef]]
FILTERS = {"matcher": "blip_match", "captioner": "blip_caption"}
BEAMS = {"sample": "beam", "beams": 3, "captions": 1}
NOTED = ("zero-shot accuracy", "image to text at 1", "text to image at 1", "caption CIDEr")  # by which a stage is known
VERSION = 6


def evaluate(run: Run, told: str, models: Mapping[str, str], known: Known) -> Facts:
    """Rows of figures of the `models` (content hashes by role) on the pairs `known`; `told` is what the report calls
    them."""
    spec, store = run.recipe.evaluate, run.workspace.store
    rows = sorted(held_out_rows(run, known), key=lambda row: str(row[1]["uid"]))[: spec.pairs]  # a uid is a hash
    passes = {role: _pass(run, role, models[role]) for role in models if role in FILTERS}
    asked: Facts = {"evaluate": spec.model_dump(), "model": models.get("clip"), "version": VERSION}
    asked["classes"] = content_hash(Path(spec.zero_shot.path)) if spec.zero_shot else None
    asked["passes"] = {role: fingerprint_of(FILTERS[role], one, {}) for role, one in passes.items()}
    asked["pairs"] = sorted([ref.group, row["uid"], row["text"], *_texts(row)] for ref, row in rows)
    path = f"evals/{fingerprint(asked)}.json"
    if not (reused := store.has(path)):
        roles = sorted(models.keys() - {BEGINNING}, reverse=True)  # captions last
        found = [row for role in roles for row in FIGURES[role](run, models[role], passes.get(role), rows)]
        store.write(path, json.dumps(found, indent=1))
    return {"rows": [{"model": told} | row for row in json.loads(store.read(path))], "reused": reused}


def _pass(run: Run, role: str, sha: str) -> Filter:
    """The recipe's filter of that role with this model, which captions by beams behind the prompt that it learned."""
    settings = run.recipe.filters.get(FILTERS[role], {}) | {"weights": str(model_folder(run.workspace, sha))}
    own = BEAMS | learned_prompt(run.workspace, sha) if role == "captioner" else {}
    return load_filter(FILTERS[role], settings | own)


def _clip(run: Run, sha: str, _: Any, rows: list[Row]) -> list[Facts]:
    from training.evaluate import retrieval, zero_shot

    spec, folder, found = run.recipe.evaluate, model_folder(run.workspace, sha), []
    if spec.zero_shot:
        found += _shot(zero_shot(folder, Path(spec.zero_shot.path), spec.zero_shot.templates))
    if spec.retrieval and len(rows) > 1:
        found += _recalls(retrieval(folder, held_out_images(run, rows), [row["text"] for _, row in rows]))
    return found


def _matcher(run: Run, _: str, one: Any, rows: list[Row]) -> list[Facts]:
    from pipelines import blip_figures
    from training.evaluate import Classes

    spec, found = run.recipe.evaluate, []
    if spec.zero_shot:
        classes = Classes.read(Path(spec.zero_shot.path), spec.zero_shot.templates)
        found += _shot(blip_figures.zero_shot(one, classes))
    if spec.retrieval and len(rows) > 1:
        texts = [row["text"] for _, row in rows]
        alone, ranked = blip_figures.retrieval(one, held_out_images(run, rows), texts, run.scratch, spec.reranked)
        found += _recalls(alone) + _recalls(ranked, " reranked")
    return found


def _captioner(run: Run, _: str, one: Any, rows: list[Row]) -> list[Facts]:
    from pipelines import blip_figures, cider
    from training.evaluate import Share

    if not rows:
        return []
    texts = blip_figures.captions(one, [row["uid"] for _, row in rows], held_out_images(run, rows))
    lengths = [len(cider.words(text)) for text in texts if text]
    agreed = cider.cider(texts, [_texts(row) for _, row in rows])
    missing = {"caption": len(texts) - len(lengths), "reference": len(texts) - agreed["n"]}
    return [
        {"figure": "caption CIDEr", "unit": "of 10", "chance": None} | agreed,
        {"figure": "caption length", "unit": "words", "chance": None} | cider.mean(lengths),
        *(
            {"figure": f"images without {what}", "chance": None} | Share.of(count, len(texts)).model_dump()
            for what, count in missing.items()
        ),
    ]


FIGURES: dict[str, Callable[[Run, str, Any, list[Row]], list[Facts]]]
FIGURES = {"clip": _clip, "matcher": _matcher, "captioner": _captioner}


def _shot(told: Any) -> list[Facts]:
    return [{"figure": "zero-shot accuracy", "chance": told.chance, **told.accuracy.model_dump()}]


def _recalls(found: Any, how: str = "") -> list[Facts]:
    shares = found.recalls.items()
    return [{"figure": n.replace("_", " ") + how, "chance": found.chance[n], **s.model_dump()} for n, s in shares]


def _texts(row: Facts) -> list[str]:
    """All texts of a pair, each once."""
    return list(dict.fromkeys(t["text"] for t in row["texts"] or [{"text": row["text"]}] if (t["text"] or "").strip()))


def held_out_images(run: Run, rows: list[Row]) -> Iterator[bytes]:
    """The rows' images, read one at a time."""
    return (run.workspace.store.read(ref.tar, row["image_offset"], row["image_size"]) for ref, row in rows)


def held_out_rows(run: Run, known: Known) -> Iterator[Row]:
    """Shard and row of each living trusted pair with a text that only evaluates."""
    columns = ["uid", "url_key", "status", "text", "texts", "image_offset", "image_size"]
    for ref in sorted(ref for refs in known.values() for ref in refs):
        table = run.workspace.store.read_table(ref.table, columns)
        rows = zip(run.workspace.alive(table), table.to_pylist(), strict=True)
        yield from (
            (ref, row) for living, row in rows if living and (row["text"] or "").strip() and held_out(row["uid"])
        )
