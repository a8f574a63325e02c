"""Checkpoints: a folder that appears whole, is verified by hash when it is read, and is passed over when damaged.

`step-00000100/` holds the tensors as torch.distributed.checkpoint writes them in safetensors (no pickle), each rank its
own part, and `state.json`, which records the files' sha256 and is sealed by its own. Any number of ranks, and whole or
cut models, read it. A `Saver` copies the rank's part of the state and writes it while training goes on: into a folder
of a temporary name, fsynced and renamed by rank 0 when all ranks have written. The last two stay, and the best.
Cost: 12 bytes / ranks of memory a weight (4 more for a moving average) while it is written, and one file as bytes.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash, fingerprint

log = logging.getLogger("pairmill.training")
CARD = "model_card.json"  # in a model's folder: which training made it
KEEP, FORMAT = 2, 2  # format 1: one file of weights, one of moments
FILE_BYTES = 2**28  # of a rank's tensors in one file: so much is held once more while it is written
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process is fine
Facts = dict[str, Any]


@contextlib.contextmanager
def publishing(target: Path, facts: Facts | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error; its files are fsynced first.
    A model's gets a card of these `facts`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        yield temporary
        if facts is not None:
            (temporary / CARD).write_text(card(facts))
        _rename(temporary, target)
    except (OSError, SafetensorError) as error:
        raise _unwritten(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def card(facts: Facts) -> str:
    """What `CARD` holds."""
    return json.dumps(facts, indent=2, sort_keys=True)


class Saver:
    """Saves while training goes on, on all ranks alike; `keep_best` keeps the one of least `loss` among its facts too.
    Leaving its block, by an error too, waits until what was begun is published."""

    def __init__(self, folder: Path, keep_best: bool = False) -> None:
        self.folder, self.keep_best = folder, keep_best
        # Of its own: the thread's messages must not come between the loop's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[Path, Future[Any]] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():  # the first error is the one to tell
            self.wait()

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, facts: Facts) -> None:
        """Begins to publish `folder`/step-N, N from `facts`; waits for the one before and raises its failure."""
        self.wait()
        target, state, writer = _prepare(self.folder, model, optimizer, facts, self.keep_best)
        self._pending = target, dcp.async_save(state, storage_writer=writer, process_group=self._group)

    def check(self) -> None:
        """Raises PairmillError if a save has failed."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Until what was begun is published; raises PairmillError if it can't be."""
        pending, self._pending = self._pending, None
        if pending:
            with _told(pending[0]):
                pending[1].result()


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, facts: Facts) -> Path:
    """Publishes `folder`/step-N, N from `facts`, of a process that trains alone."""
    target, state, writer = _prepare(folder, model, optimizer, facts)
    with _told(target):
        dcp.save(state, storage_writer=writer, no_dist=True)
    return target


def latest(folder: Path) -> tuple[Path, Facts] | None:
    """The newest whole checkpoint and its facts; damaged ones are passed over with a message."""
    for old in folder.glob(".tmp-*"):
        shutil.rmtree(old)
    for path in _folders(folder):
        reason, facts = _verify(path)
        if reason is None:
            return path, facts
        log.warning("checkpoint %s is passed over: %s", path.name, reason)
    return None


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads what was saved, by however many ranks, into a model and an optimizer of the same architecture."""
    state, reader = tensors(model, optimizer), HuggingFaceStorageReader(str(path))
    try:
        if other := set(reader.read_metadata().state_dict_metadata) ^ set(state):
            raise ValueError(f"{len(other)} tensors that only one of the two has, such as {min(other)}")
        dcp.load(state, storage_reader=reader, no_dist=True)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        raise PairmillError(
            expected=f"a checkpoint of this run's architecture in {path}",
            found=" ".join(str(_first(error)).split())[:300],
            remedy="give the other architecture another folder, or delete the checkpoints",
        ) from error


def check_room(out: Path, held: torch.nn.Module, keep_best: bool) -> None:
    """Raises PairmillError where the disk can't take the checkpoints: the weights and two moments of each, as often as
    they are kept, and once more while they are written; those of an earlier try lie there already."""
    each = sum(p.numel() * 4 * (3 if p.requires_grad else 1) for p in held.parameters())
    needed = each * (KEEP + 1 + keep_best - min(KEEP + keep_best, len(_folders(out / "checkpoints"))))
    free = shutil.disk_usage(out).free
    if free < needed:
        raise PairmillError(
            expected=f"{needed / 1e6:.0f} MB free for checkpoints in {out}",
            found=f"{free / 1e6:.0f} MB",
            remedy="free some space, or take another workspace",
        )


def tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, in place: the model's state, and AdamW's of each parameter. Scalars are (1,)."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = optimizer.state[parameter]
            if not own:  # as AdamW would make it
                own["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                own |= {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            found |= {f"{key}.{names[parameter]}": value for key, value in own.items()}
    return {name: value.detach().reshape(value.shape or (1,)) for name, value in found.items()}


class _Writer(HuggingFaceStorageWriter):
    """Writes safetensors, and calls `publish` on rank 0 when all ranks have."""

    def __init__(self, folder: Path, files: dict[str, int], publish: Callable[[], None]) -> None:
        super().__init__(str(folder), files, save_distributed=True)
        self._publish = publish

    def finish(self, metadata: Any, results: Any) -> None:
        told = {Path(self.path) / one.storage_data.relative_path for own in results for one in own}
        if missing := sorted(path.name for path in told if not path.exists()):
            raise OSError(f"{', '.join(missing[:3])} of other ranks not here: all must write into one shared folder")
        self._publish()


def _prepare(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, facts: Facts, keep_best: bool = False
) -> tuple[Path, dict[str, Tensor], _Writer]:
    """Where a checkpoint will lie, this rank's part of it, and what writes that: all of what is cut, and its share of
    what is whole on every rank."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    name, state = f"step-{facts['step']:08d}", tensors(model, optimizer)
    target, temporary = folder / name, folder / f".tmp-{name}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
    files, held = {}, 0
    for key, value in state.items():
        files[key] = 1 + held // (ranks * FILE_BYTES)
        held += value.numel() * value.element_size()
    shared = sorted((k for k, v in state.items() if not isinstance(v, DTensor)), key=lambda k: (state[k].numel(), k))
    own = {k: v for k, v in state.items() if isinstance(v, DTensor)} | {k: state[k] for k in shared[rank::ranks]}

    def publish() -> None:
        record = {"format": FORMAT, "facts": facts, "sha256": {p.name: content_hash(p) for p in temporary.iterdir()}}
        (temporary / "state.json").write_text(json.dumps(record | {"seal": fingerprint(record)}, sort_keys=True))
        _rename(temporary, target)
        _prune(folder, target, keep_best)

    return target, own, _Writer(temporary, files, publish)


def _prune(folder: Path, newest: Path, keep_best: bool) -> None:
    """Removes all but the last and the best. What is later than `newest` is damaged, or of a run that was given up."""
    ours = [path for path in _folders(folder) if path.name <= newest.name]
    kept = ours[:KEEP] + ([min(ours, key=_loss)] if keep_best else [])
    for old in set(_folders(folder)) - set(kept):
        shutil.rmtree(old)


def _loss(path: Path) -> float:
    loss = _verify(path, deep=False)[1].get("loss")
    return math.inf if loss is None else float(loss)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """What a failed save says. The rest of it is swept away by rank 0 or by the next start."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        shutil.rmtree(target.parent / f".tmp-{target.name}", ignore_errors=True)
        first = _first(error)
        if isinstance(first, OSError | SafetensorError):
            raise _unwritten(target, first) from error
        raise first from None


def _first(error: BaseException) -> BaseException:
    """The first rank's reason."""
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error


def _unwritten(target: Path, error: BaseException) -> PairmillError:
    return PairmillError(
        expected=f"to write {target}",
        found=f"{getattr(error, 'strerror', None) or error}; nothing was published, what was there before is untouched",
        remedy="free some space or mend the folder, then run the same command again: it resumes",
    )


def _verify(path: Path, deep: bool = True) -> tuple[str | None, Facts]:
    """Why the checkpoint can't be used, if it can't, and its facts; its files are read if `deep`."""
    try:
        state = json.loads((path / "state.json").read_text())
        seal = state.pop("seal")
        if fingerprint(state) != seal:
            return "state.json was changed after it was written", {}
        if state.get("format") != FORMAT:
            return "it is of an earlier format", {}
        for name, recorded in state["sha256"].items() if deep else ():
            if content_hash(path / name) != recorded:
                return f"{name} is not what was written", {}
        return None, state["facts"]
    except (OSError, ValueError, KeyError, AttributeError, PairmillError) as error:
        return f"{type(error).__name__}: {error}", {}


def _folders(folder: Path) -> list[Path]:
    """Published checkpoints, the newest first."""
    return sorted(folder.glob("step-????????"), reverse=True)


def _rename(temporary: Path, target: Path) -> None:
    """Brings the folder and its files to the disk, then gives it its name."""
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    temporary.chmod(0o755)
    temporary.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
