"""Towers that don't learn (LiT, arXiv 2111.07991): parts of ours that are locked, and heads on another's features.

A locked parameter has no gradient, no place in the optimizer, and where all below it is locked no graph: the
gradients of the rest are those of a full run. A foreign tower isn't even run: its features are columns that a filter
made once, and a `Head` on them is trained, thousands of pairs a second on one core. A head standardises its features by
their mean and deviation, which the export folds into its first layer. Dropout is drawn by counting from a seed of each
row (splitmix64), so it is the same in any layout of ranks and parts, in a resumed run and on any device.

Legend: B examples, D width of the features, E embedding width.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.models.clip import Towers
from training.packing import Move

LAST = {"ln_post": 0, "ln_final": 0, "proj": 1, "pool": 1, "text_projection": 1}  # groups above the last block's
BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
TEXT = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


@dataclass(frozen=True)
class Rows:
    """Features (B, D) that stand for images or texts; `seeds` (B,) int64 are what dropout is drawn from."""

    values: Tensor
    seeds: Tensor | None = None

    @property
    def useful(self) -> int:
        return len(self.values)

    @property
    def place(self) -> Tensor:
        """A row for each token that is computed, as packed examples have it; so are `tokens` and `pool`."""
        return self.values

    tokens = pool = place

    def moved(self, move: Move) -> "Rows":
        return Rows(move(self.values), None if self.seeds is None else move(self.seeds))


def draws(seeds_B: Tensor, first: int, count: int) -> Tensor:
    """Of each seed its draws `first` to `first + count`, (B, count), int64 in [0, 2**53)."""
    x = seeds_B[:, None] + (0x9E3779B97F4A7C15 - 2**64) * torch.arange(first, first + count, device=seeds_B.device)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        x = (x ^ (x >> shift & 2 ** (64 - shift) - 1)) * factor  # int64 wraps; the mask makes it a logical shift
    return x >> 11 & 2**53 - 1


class Head(nn.Module):
    """Features to the shared space, (B, D) to (B, E): linear layers with ReLU between, dropout before each. Where
    `residual`, the last E features are added to that; training begins as these alone."""

    mean: Tensor
    scale: Tensor

    def __init__(
        self, width: int, hidden: Sequence[int], embed_dim: int, dropout: float = 0.0, residual: bool = False
    ) -> None:
        super().__init__()
        sizes = [width, *hidden, embed_dim]
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*[m for layer in linear for m in (layer, nn.ReLU())][:-1])
        self.dropout, self.kept = dropout, embed_dim if residual else 0
        if residual:
            for parameter in linear[-1].parameters():
                nn.init.zeros_(parameter)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, values_ND: Tensor) -> None:
        """Standardises by these features; rows with what isn't finite are none. A column that varies by no more than
        fp16 rounds says nothing: its scale is 0, for another value than the usual would come in as a huge one."""
        rows_ND = values_ND[values_ND.isfinite().all(-1)].double()
        std_D, half = rows_ND.std(0), torch.finfo(torch.float16)
        told = std_D > rows_ND.square().mean(0).sqrt() * half.eps + half.tiny
        self.mean.copy_(rows_ND.mean(0))
        self.scale.copy_(torch.where(told, std_D.reciprocal(), 0.0))

    def forward(self, rows: Rows) -> Tensor:
        x_BD = (rows.values.to(self.mean) - self.mean) * self.scale
        drawn = 0
        for layer in self.layers:
            if self.training and self.dropout and isinstance(layer, nn.Linear):
                assert rows.seeds is not None
                kept = draws(rows.seeds, drawn, layer.in_features) >= int(self.dropout * 2**53)
                drawn, x_BD = drawn + layer.in_features, x_BD * kept / (1 - self.dropout)
            x_BD = layer(x_BD)
        return x_BD + rows.values[:, -self.kept :].to(x_BD) if self.kept else x_BD

    @staticmethod
    def of(plain: dict[str, Tensor], residual: bool = False) -> "Head":
        """The head, in eval mode, that `plain` told; a KeyError or RuntimeError where it is none."""
        weights = [tensor for name, tensor in sorted(plain.items(), key=_place) if name.endswith("weight")]
        head = Head(weights[0].shape[1], [len(w) for w in weights[:-1]], len(weights[-1]), residual=residual)
        head.layers.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in plain.items()})
        return head.eval()


def _place(item: tuple[str, Tensor]) -> int:
    return int(item[0].split(".")[1])


def plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """From a head's state dict that of a plain `nn.Sequential` that does the same: `layers.0.weight`, …"""
    whole = {name: tensor.cpu().double() for name, tensor in weights.items()}
    mean, scale = whole.pop("mean"), whole.pop("scale")
    whole["layers.0.weight"] = whole["layers.0.weight"] * scale
    whole["layers.0.bias"] = whole["layers.0.bias"] - whole["layers.0.weight"] @ mean
    return {name: tensor.float().contiguous() for name, tensor in whole.items()}


def put_heads(model: Towers, image: Head | None, text: Head | None) -> None:
    """Puts heads in the place of towers, which are then given `Rows` instead of packed examples."""
    if image:
        model.visual = image
    if text:
        model.head = text
        for name in TEXT:
            delattr(model, name)


def part_of(name: str) -> str:
    """What a parameter belongs to: image, text or "logit_"."""
    return "image" if name.startswith("visual.") else "logit_" if name.startswith("logit_") else "text"


def lock(model: Towers, tower: str, unlocked_groups: int) -> None:
    """Locks the `image` or the `text` tower but for its last groups: its projection (or pool) is one, each block
    another, the final norm belongs to the last block, and all that comes before the blocks is one more."""
    own = [(name.removeprefix("visual."), p) for name, p in model.named_parameters() if part_of(name) == tower]
    blocks = 1 + max(int(found[1]) for name, _ in own if (found := BLOCK.match(name)))
    for name, parameter in own:
        found, part = BLOCK.match(name), name.partition(".")[0]
        group = 1 + int(found[1]) if found else blocks + LAST[part] if part in LAST else 0
        parameter.requires_grad_(group >= blocks + 2 - unlocked_groups)
