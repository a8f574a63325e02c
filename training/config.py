"""What a training run is told and what it tells: JSON both ways, so that any launcher can start one."""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pairs.fingerprint import content_hash, fingerprint
from pairs.pretrain import BlipSpec, PretrainSpec
from pairs.shard import ShardRef
from pairs.store import Store

VERSION, BLIP_VERSION = 3, 2  # of what a training makes of the same job: raise with any change that reaches the weights
UNSEEN = {
    "workers",
    "checkpoint_every",
    "activations",
    "parallel",
    "keep_best",
    "tensorboard",
    "profile_steps",
    "loader_workers",
    "cache",
    "cache_gb",
}  # settings that change no number
BLIP_ROLES = ("beginning", "captioner", "matcher")
RESULT = "result.json"  # in the run's folder, beside its model: what varies from run to run


class Pin(BaseModel):
    """A training shard that the run is pinned to, by the sha256 of its tar."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: str
    index: int
    tar_sha256: str

    @property
    def ref(self) -> ShardRef:
        return ShardRef(self.folder, self.index)


class Job(BaseModel):
    """What any training is told. `store` is the workspace's root (a path or an fsspec URL); `out_dir` a local folder,
    one for each run; `apart` are uids that aren't trained on, as canaries are made from them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    store: str
    shards: list[Pin]
    out_dir: str
    apart: list[str] = []

    @property
    def fingerprint(self) -> str:
        """What a training is known by: over the shards' content and the settings, but not the number of workers."""
        raise NotImplementedError

    def _content(self) -> dict[str, Any]:
        """What a fingerprint covers beside the settings: the shards' content, not where they lie."""
        return {"shards": [pin.model_dump() for pin in self.shards], "apart": self.apart}


class TrainConfig(Job):
    """A CLIP, trained on training shards. Towers that are columns are read from `scores`, folders of score tables by
    filter; `weights` are the hashes of what towers start from, and of a tokenizer's folder, by the recipe's names."""

    spec: PretrainSpec
    scores: dict[str, str] = {}
    weights: dict[str, str] = {}

    @property
    def fingerprint(self) -> str:
        spec = self.spec.model_dump(exclude=UNSEEN)
        starts = {name: value for name, value in (("scores", self.scores), ("weights", self.weights)) if value}
        return fingerprint(self._content() | starts | {"version": VERSION, "spec": spec})


def folder_of(store: Store, name: str) -> str:
    """The folder that a job names as tokenizer or start: `models/<sha256>` of the workspace, or as it is."""
    return store.full(name) if re.fullmatch(r"models/[0-9a-f]{64}", name) else name


def identity(config: TrainConfig) -> dict[str, str]:
    """What tells a training's work from another's beside its plan: the settings, and the content of the folders that it
    starts from (weights, tokenizer) where there are any, as a path can't tell what was made anew there."""
    spec, towers = config.spec, config.spec.towers
    named = [*spec.blip.start, spec.model.tokenizer, towers.image.weights, towers.text.weights]
    found = [content_hash(Path(name)) if name and Path(name).is_dir() else None for name in named]
    return {"config": config.fingerprint} | ({"starts": fingerprint({"in order": found})} if any(found) else {})


class BlipJob(Job):
    """A captioner and a match filter, trained on the training shards of the trusted pairs."""

    spec: BlipSpec

    @property
    def fingerprint(self) -> str:
        spec = self.spec.model_dump(exclude={"checkpoint_every"})
        return fingerprint(self._content() | {"version": BLIP_VERSION, "blip": spec})


class BlipResult(BaseModel):
    """Folders that transformers loads, and how many pairs were learned from or left out, by reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beginning: Path  # what captioner and match filter share: an image tower and words that were learned together
    captioner: Path
    matcher: Path
    pairs: int
    left_out: dict[str, int]

    @property
    def models(self) -> dict[str, Path]:
        """The folders by role."""
        return {role: getattr(self, role) for role in BLIP_ROLES}


class TrainResult(BaseModel):
    """What a finished run reports. `left_out` counts rows by reason, `damaged` masked pairs (each time met)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str  # the folder that open_clip loads, or that holds the `parts`
    fingerprint: str  # of the config
    plan: str
    steps: int
    resumed_from: int
    pairs: int  # different pairs in the plan
    left_out: dict[str, int]
    truncated: int
    damaged: int
    skipped: int  # steps without an update, as loss or gradient was not finite
    loss: float | None  # mean of the finite ones over the last tenth of the steps; None where there are none
    seconds: float  # of the process that ended it
    pairs_per_s: float | None
    fill: float | None
    precision: str
    attention: str
    torch: str  # its version
    parts: list[str] = []  # a BLIP's roles, each a folder in `model`

    @property
    def models(self) -> dict[str, Path]:
        """The folders by role."""
        return {part: Path(self.model) / part for part in self.parts} or {"clip": Path(self.model)}
