"""What a training run is told and what it tells: JSON both ways, so that any launcher can start one."""

from pydantic import BaseModel, ConfigDict

from pairs.fingerprint import fingerprint
from pairs.recipe import PretrainSpec
from pairs.shard import ShardRef

VERSION = 1  # of what a training makes of the same config: raise it with any change that reaches the weights
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


class TrainConfig(BaseModel):
    """`store` is the workspace's root (a path or an fsspec URL); `out_dir` a local folder, one for each run;
    `apart` are uids that aren't trained on, as canaries are made from them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    store: str
    shards: list[Pin]
    spec: PretrainSpec
    out_dir: str
    apart: list[str] = []

    @property
    def fingerprint(self) -> str:
        """Over the shards' content and the settings; not over where they lie, nor over the number of workers."""
        spec = self.spec.model_dump(exclude={"workers", "checkpoint_every"})
        shards = [pin.model_dump() for pin in self.shards]
        return fingerprint({"version": VERSION, "shards": shards, "apart": self.apart, "spec": spec})


class TrainResult(BaseModel):
    """What a finished run reports. `left_out` counts rows by reason, `damaged` masked pairs (each time met)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str  # the folder that open_clip loads
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
