"""Trainings of a run: each is keyed by what goes in, submitted as processes of its own, and its result lands in the
workspace's models by content. A training that is done is never done again.
"""

import functools
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filters.weights import clip_hashes
from pairs import __version__
from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.pretrain import BlipSpec, PretrainSpec
from pairs.shard import ShardRef
from pairs.store import table_metadata
from pipelines.models import publish_models, trained
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
    """Trains a CLIP or a BLIP on the selection's training shards of `shards`; returns its record (models, result,
    config). `scores` are the folders of score tables by filter, for towers that are columns."""
    starts, words = (spec.towers.image, spec.towers.text), spec.model.tokenizer
    by_path = spec.objective != "blip" and words != "clip" and Path(words).is_dir()
    own = {words: content_hash(Path(words))} if by_path else {}
    config = TrainConfig(
        store=run.workspace.store.root,
        shards=pins(run, selection, shards),
        spec=spec,
        out_dir="",
        apart=list(apart),
        scores={f.partition(".")[0]: (scores or {})[f.partition(".")[0]] for start in starts for f in start.features},
        weights=own | {s.weights: weights_hash(s.weights) for s in starts if s.weights},
    )
    told = {"train_config": config.model_dump(mode="json", exclude={"store", "out_dir"})}
    return _record(run, name, config, launch.train, lambda line: (line["step"] + 1, spec.steps, _loss(line)), told)


def weights_hash(name: str) -> str:
    """The hash of what a tower starts from: a folder, or open_clip's NAME:TAG."""
    model, _, tag = name.partition(":")
    return clip_hashes(model, tag or name)["weights"]


def _loss(line: Facts) -> str:
    return "no finite loss" if line["loss"] is None else f"loss {line['loss']:.3f}"


def train_blip(run: Run, name: str, selection: str, shards: Shards, spec: BlipSpec, apart: Sequence[str]) -> Facts:
    """Trains a captioner and a match filter on a selection of the trusted pairs; returns their record."""
    pinned = pins(run, selection, shards)
    job = BlipJob(store=run.workspace.store.root, shards=pinned, spec=spec, out_dir="", apart=list(apart))
    told = {"blip_job": job.model_dump(mode="json", exclude={"store", "out_dir"})}
    return _record(run, name, job, launch.train_blip, lambda at: (at["step"] + 1, at["steps"], at["stage"]), told)


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
