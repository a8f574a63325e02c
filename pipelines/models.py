"""Trained models in the workspace: `models/<sha256>/` by content, and an index from what they were trained on.

`models/index/<fingerprint>.json` is the completion marker of a training: the fingerprint covers the objective's
settings and the hashes of every tar that was read, so the same training is never done twice in a workspace.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.store import TEMPORARY
from pairs.workspace import Workspace


def trained(workspace: Workspace, fingerprint: str) -> dict[str, Any] | None:
    """The facts of a finished training, or None. `facts["models"]` maps roles to content hashes. A training on what
    `compact` made of its shards is the same one."""
    path = f"models/index/{fingerprint}.json"
    told = json.loads(workspace.store.read(path)) if workspace.store.has(path) else None
    return trained(workspace, told["same_as"]) if told and "same_as" in told else told


def publish_models(
    workspace: Workspace, fingerprint: str, folders: dict[str, Path], facts: dict[str, Any]
) -> dict[str, Any]:
    """Copies model folders (by role: clip, captioner, matcher) into the workspace, then writes the marker."""
    models = {role: _publish(workspace, folder) for role, folder in folders.items()}
    record = facts | {"models": models, "fingerprint": fingerprint}
    workspace.store.write(f"models/index/{fingerprint}.json", json.dumps(record, indent=1, sort_keys=True, default=str))
    return record


def publish_folder(workspace: Workspace, folder: Path, only: Sequence[str] = ()) -> str:
    """The name in the workspace, `models/<sha256>`, of a copy of a folder that a training starts from, or of the files
    `only` in it: whatever becomes of the folder, the training's name and what it read stay."""
    return f"models/{_publish(workspace, folder, only)}"


def _publish(workspace: Workspace, folder: Path, only: Sequence[str] = ()) -> str:
    name = content_hash(folder, only)
    local = _local(workspace)
    target = local / "models" / name
    if not target.is_dir():
        temporary = local / "models" / f"{TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(folder, temporary, ignore=lambda _, names: {*names} - {*only} if only else ())
        temporary.rename(target)
    return name


def model_folder(workspace: Workspace, sha256: str) -> Path:
    """The local folder of a published model."""
    path = _local(workspace) / "models" / sha256
    if not path.is_dir():
        raise PairmillError(
            expected=f"a model at {path}", found="no such folder", remedy="run `pairmill pretrain` on this workspace"
        )
    return path


def learned_prompt(workspace: Workspace, sha256: str) -> dict[str, str]:
    """{prompt: what a captioner learned to write behind}, where a training of this workspace made it."""
    for path in workspace.store.files("models/index", ".json"):
        record = json.loads(workspace.store.read(path))
        if record.get("models", {}).get("captioner") == sha256:
            given = (record.get("train_config") or record.get("blip_job") or {}).get("spec", {})
            return {key: value for key, value in given.get("blip", given).items() if key == "prompt"}
    return {}


def _local(workspace: Workspace) -> Path:
    if workspace.store.local is None:
        raise PairmillError(
            expected="a workspace on a local or mounted file system for training",
            found=workspace.store.root,
            remedy="crawl, fetch and curate work on any store; to train, mount the workspace and name that path",
        )
    return workspace.store.local
