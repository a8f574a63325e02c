"""What a step computes of a batch, whatever is trained: the loop, and the rehearsal before it, know no more of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from training.accumulate import Context, features
from training.data import Batch
from training.objectives import OBJECTIVES, Share

Found = tuple[Tensor, Tensor, Callable[[Tensor], None], dict[str, Tensor]]


class Teach(Protocol):
    """`ready` comes before a step and `done` after one that was taken; `loss` changes nothing. `unmeasured` are
    numbers of a line that it can't tell."""

    unmeasured: tuple[str, ...]

    def ready(self) -> None: ...

    def loss(self, run: nn.Module, batch: Batch, step: int, mixed: Context) -> Found:
        """Its sum and count (of this rank), what takes the gradient of a scaled sum into the weights, and scalars over
        all ranks to tell."""
        ...

    def done(self) -> None: ...

    def kept(self, batch: Batch, half: bool) -> float:
        """About how many bytes the backward finds on a CPU beside what `Transformer`s keep."""
        ...


@dataclass
class Contrast:
    """Two towers' features, under an objective."""

    objective: str
    rank: int
    unmeasured: tuple[str, ...] = ()

    def ready(self) -> None:
        pass

    def loss(self, run: nn.Module, batch: Batch, step: int, mixed: Context) -> Found:
        (image_BE, text_BE, scale, bias), back = features(run, batch.parts, mixed)
        valid, same = (x.to(image_BE.device, non_blocking=True) for x in (batch.valid, batch.same))
        share = Share(valid, same, batch.counts, self.rank)
        total, count = OBJECTIVES[self.objective](image_BE, text_BE, scale, bias, share)
        return total, count, back, {}

    def done(self) -> None:
        pass

    def kept(self, batch: Batch, half: bool) -> float:
        return 0.0
