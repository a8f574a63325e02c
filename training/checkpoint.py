"""Checkpoints: a folder that appears whole, is verified by hash when it is read, and is passed over when damaged.

`step-00000100/` holds `model.safetensors`, `optimizer.pt` (tensors and numbers only) and `state.json`, which
records the others' sha256 and is sealed by its own. The folder is written under a temporary name, fsynced and
renamed. The last two stay.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash, fingerprint

log = logging.getLogger("pairmill.training")
KEEP = 2


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error; its files are fsynced first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.chmod(0o755)
        temporary.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PairmillError(
            expected=f"to write {target}",
            found=f"{reason}; nothing was published, what was there before is untouched",
            remedy="free some space or mend the folder, then run the same command again: it resumes",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> Path:
    """Publishes `folder`/step-N, N from `facts`, and removes all others but the one before."""
    target = folder / f"step-{facts['step']:08d}"
    with publishing(target) as temporary:
        # As bytes first: a full disk is then an OSError, where the libraries raise errors of their own.
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        (temporary / "model.safetensors").write_bytes(to_bytes(weights))
        moments = io.BytesIO()
        torch.save(optimizer.state_dict(), moments)
        (temporary / "optimizer.pt").write_bytes(moments.getbuffer())
        state = {"facts": facts, "sha256": {p.name: content_hash(p) for p in sorted(temporary.iterdir())}}
        (temporary / "state.json").write_text(json.dumps(state | {"seal": fingerprint(state)}, sort_keys=True))
    ours = [path for path in _folders(folder) if path.name <= target.name]
    for old in set(_folders(folder)) - set(ours[:KEEP]):  # later ones are damaged, or of a run that was given up
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
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
    """Loads what `save` wrote into a model and an optimizer of the same architecture."""
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError) as error:
        raise PairmillError(
            expected=f"a checkpoint of this run's architecture in {path}",
            found=" ".join(str(error).split())[:300],
            remedy="give the other architecture another folder, or delete the checkpoints",
        ) from error


def _verify(path: Path) -> tuple[str | None, dict[str, Any]]:
    try:
        state = json.loads((path / "state.json").read_text())
        seal = state.pop("seal")
        if fingerprint(state) != seal:
            return "state.json was changed after it was written", {}
        for name, recorded in state["sha256"].items():
            if content_hash(path / name) != recorded:
                return f"{name} is not what was written", {}
        return None, state["facts"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}", {}


def _folders(folder: Path) -> list[Path]:
    """Published checkpoints, the newest first."""
    return sorted(folder.glob("step-????????"), reverse=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
