"""Trainings and evaluations of a run: each is keyed by what goes in, submitted as processes of its own, and its result
lands in the workspace's models by content. A training that is done is never done again.
"""

import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filters.weights import clip_hashes
from pairs import __version__
from pairs.errors import PairmillError
from pairs.fingerprint import content_hash, fingerprint
from pairs.identity import held_out
from pairs.pretrain import BlipSpec, PretrainSpec
from pairs.recipe import EvaluateSpec
from pairs.shard import ShardRef
from pairs.store import table_metadata
from pipelines.models import model_folder, publish_models, trained
from pipelines.run import Run
from pipelines.training_shards import training_shard
from training import launch
from training.config import BlipJob, BlipResult, Job, Pin, TrainConfig, TrainResult

Facts = dict[str, Any]
Shards = Mapping[str, Sequence[ShardRef]]  # by source
J = TypeVar("J", bound=Job)


@functools.cache
def made_by() -> Facts:
    """The code that makes this run: version, and commit where it runs from a checkout (`dirty`: changed since)."""
    commit = _git("rev-parse", "HEAD")
    dirty = {"dirty": True} if commit and _git("status", "--porcelain", "--untracked-files=no") else {}
    return {"version": __version__, "commit": commit or None} | dirty


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def pins(run: Run, selection: str, shards: Shards) -> list[Pin]:
    """A selection's training shards of the pair `shards` that the run is pinned to, pinned by their tars' hashes; what
    later runs have added beside them is theirs."""
    store, folder = run.workspace.store, f"shards/{selection.split('/')[1]}"
    refs = sorted(training_shard(folder, ref) for refs in shards.values() for ref in refs)
    tables = ((ref, store.read_table(ref.table, ["uid"])) for ref in refs)
    full = [(ref, table_metadata(table)) for ref, table in tables if table.num_rows]
    if not full:
        raise PairmillError(
            expected=f"kept pairs in {selection}",
            found="none",
            remedy="loosen `keep`: the funnel names what dropped them",
        )
    return [Pin(folder=ref.folder, index=ref.index, tar_sha256=meta["tar_sha256"]) for ref, meta in full]


def pretrain(
    run: Run,
    name: str,
    selection: str,
    shards: Shards,
    spec: PretrainSpec,
    apart: Sequence[str],
    scores: Mapping[str, str] | None = None,
) -> Facts:
    """Trains a CLIP on the selection's training shards of `shards`; returns its record (models, result, config).
    `scores` are the folders of score tables by filter, for towers that are columns."""
    starts = (spec.towers.image, spec.towers.text)
    config = TrainConfig(
        store=run.workspace.store.root,
        shards=pins(run, selection, shards),
        spec=spec,
        out_dir="",
        apart=list(apart),
        scores={f.partition(".")[0]: (scores or {})[f.partition(".")[0]] for start in starts for f in start.features},
        weights={s.weights: weights_hash(s.weights) for s in starts if s.weights},
    )
    told = {"train_config": config.model_dump(mode="json", exclude={"store", "out_dir"})}
    return _record(run, name, config, launch.train, lambda line: (line["step"] + 1, spec.steps, _loss(line)), told)


def weights_hash(name: str) -> str:
    """The hash of what a tower starts from: a folder, or open_clip's NAME:TAG."""
    model, _, tag = name.partition(":")
    return clip_hashes(model, tag or name)["weights"]


def _loss(line: Facts) -> str:
    return "no finite loss" if line["loss"] is None else f"loss {line['loss']:.3f}"


def trusted_pins(run: Run, known: dict[str, list[ShardRef]]) -> list[Pin]:
    """All pair shards of the trusted sources, pinned by their tars' hashes."""
    refs = sorted(ref for refs in known.values() for ref in refs)
    metas = (table_metadata(run.workspace.store.read_table(ref.table, ["uid"])) for ref in refs)
    return [Pin(folder=r.folder, index=r.index, tar_sha256=m["tar_sha256"]) for r, m in zip(refs, metas, strict=True)]


def train_blip(run: Run, name: str, known: dict[str, list[ShardRef]], spec: BlipSpec, apart: Sequence[str]) -> Facts:
    """Trains a captioner and a match filter on the trusted pairs; returns their record."""
    pinned = trusted_pins(run, known)
    job = BlipJob(store=run.workspace.store.root, shards=pinned, spec=spec, out_dir="", apart=list(apart))
    return _record(run, name, job, launch.train_blip, lambda line: (line["step"] + 1, line["steps"], line["stage"]), {})


def _record(
    run: Run,
    name: str,
    job: J,
    train: Callable[[J, launch.OnLine], TrainResult | BlipResult],
    tell: Callable[[Facts], tuple[int, int, str]],
    told: Facts,
) -> Facts:
    """The record of the job: of a training that was done before, or of one that is done now, with what is `told`
    beside its result. `tell` makes of each line what the console shows."""
    if record := trained(run.workspace, job.fingerprint):
        return record | {"reused": True}
    folder = f"{name}/{job.fingerprint}"  # other settings or shards never meet these checkpoints
    out = run.scratch / folder
    show = run.console.progress(f"train {name}")
    result = train(job.model_copy(update={"out_dir": str(out)}), lambda line: show(*tell(line)))
    facts = {"result": result.model_dump(mode="json"), "folder": f"{run.folder}/{folder}"} | told
    record = publish_models(run.workspace, job.fingerprint, result.models, facts)
    if not (isinstance(job, TrainConfig) and job.spec.keep_best):
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return record | {"reused": False}


def evaluate(run: Run, told: str, sha: str, spec: EvaluateSpec, known: dict[str, list[ShardRef]]) -> Facts:
    """Rows of figures of one model; `told` is what the report calls it."""
    pairs = sorted([ref.group, row["uid"], row["text"]] for ref, row in held_out_rows(run, known))
    classes = content_hash(Path(spec.zero_shot.path)) if spec.zero_shot else None
    mark = fingerprint({"evaluate": spec.model_dump(), "classes": classes, "model": sha, "pairs": pairs, "version": 3})
    path = f"evals/{mark}.json"
    store = run.workspace.store
    reused = store.has(path)
    if not reused:
        store.write(path, json.dumps(_figures(run, sha, spec, known), indent=1))
    rows = [{"model": told} | row for row in json.loads(store.read(path))]
    return {"rows": rows, "reused": reused}


def _figures(run: Run, sha: str, spec: EvaluateSpec, known: dict[str, list[ShardRef]]) -> list[Facts]:
    from training.evaluate import retrieval, zero_shot

    folder = model_folder(run.workspace, sha)
    rows: list[Facts] = []
    if spec.zero_shot:
        told = zero_shot(folder, Path(spec.zero_shot.path), spec.zero_shot.templates)
        rows.append({"figure": "zero-shot accuracy", "chance": told.chance, **told.accuracy.model_dump()})
    images, texts = held_out_pairs(run, known)
    if spec.retrieval and len(images) > 1:
        found = retrieval(folder, images, texts)
        for name, share in found.recalls.items():
            rows.append({"figure": name.replace("_", " "), "chance": found.chance[name], **share.model_dump()})
    return rows


def held_out_pairs(run: Run, known: dict[str, list[ShardRef]]) -> tuple[list[bytes], list[str]]:
    """Images and first texts of the trusted pairs that only evaluate."""
    rows, store = held_out_rows(run, known), run.workspace.store
    images = [store.read(ref.tar, row["image_offset"], row["image_size"]) for ref, row in rows]
    return images, [row["text"] for _, row in rows]


def held_out_rows(run: Run, known: dict[str, list[ShardRef]]) -> list[tuple[ShardRef, Facts]]:
    """Shard and row of each living trusted pair with a text that only evaluates."""
    columns, found = ["uid", "url_key", "status", "text", "image_offset", "image_size"], []
    for ref in sorted(ref for refs in known.values() for ref in refs):
        table = run.workspace.store.read_table(ref.table, columns)
        rows = zip(run.workspace.alive(table), table.to_pylist(), strict=True)
        found += [(ref, row) for living, row in rows if living and row["text"] and held_out(row["uid"])]
    return found
