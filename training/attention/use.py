"""What decides whether a backend can run: nothing of it needs a tensor, so that a run is checked before it starts."""

from typing import NamedTuple

import torch


class Use(NamedTuple):
    """A call of attention. `kind` is `Layout.kind`, `width` that of a head, `grad` whether a backward follows."""

    device: str
    dtype: torch.dtype
    kind: str = "full"
    width: int = 64
    grad: bool = True
