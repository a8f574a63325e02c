"""Where segments lie among packed tokens, and which keys each query sees: all that a backend may know.

One rule serves every mask: a query at position i of its segment sees keys j < max(i + 1, prefix), where prefix is 0 in
a causal segment, P in one whose first P tokens see each other, and the number of keys in a bidirectional one. `runs`
and lengths stay on the host, so that no backend waits for the device; what a backend derives from a layout (tiles,
block masks) is made once, for all layers of a step, and kept in `memo`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Neighbouring segments alike in everything: `times` of them, each of `length` queries and `keys` keys."""

    times: int
    length: int
    keys: int
    prefix: int  # keys that every query sees


@dataclass(frozen=True)
class Layout:
    """Where segments lie among T tokens (and, for cross-attention, among K keys of another stream)."""

    cu_seqlens: Tensor  # int32, (S + 1,), from 0 to T
    cu_seqlens_k: Tensor  # the same tensor, unless the keys lie in a stream of their own
    max_length: int
    max_length_k: int
    causal: bool
    kind: str  # full, causal, prefix or cross: what a backend may or may not do
    runs: tuple[Run, ...]
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(
        lengths: Sequence[int],
        causal: bool = False,
        prefix: int | Sequence[int] = 0,
        keys: Sequence[int] | None = None,
    ) -> "Layout":
        """The layout of segments of these `lengths`, each at least 1, one after another.

        `prefix`: how many first tokens of each causal segment see each other and are seen by all (one number, or
        one a segment). `keys`: lengths of the keys that each segment looks at, where they aren't its own tokens.
        """
        assert lengths and min(lengths) >= 1, "a segment holds at least one token: some kernels crash on none"
        assert keys is None or (len(keys) == len(lengths) and min(keys) >= 1 and not causal), "cross-attention is full"
        first = [prefix] * len(lengths) if isinstance(prefix, int) else list(prefix)
        assert len(first) == len(lengths) and (causal or not any(first)), "a prefix belongs to a causal segment"
        ks = lengths if keys is None else keys
        seen = [min(p, k) for p, k in zip(first, ks, strict=True)] if causal else ks
        # Lengths [2, 2, 5] are the runs [(2, 2, ...), (1, 5, ...)].
        alike = itertools.groupby(zip(lengths, ks, seen, strict=True))
        runs = tuple(Run(len(list(group)), *same) for same, group in alike)
        kind = "cross" if keys is not None else "full" if not causal else "prefix" if max(seen) > 1 else "causal"
        ends = _ends(lengths)
        return Layout(ends, ends if keys is None else _ends(ks), max(lengths), max(ks), causal, kind, runs)

    @cached_property
    def tokens(self) -> int:
        return sum(run.times * run.length for run in self.runs)

    @cached_property
    def keys(self) -> int:
        """How many keys there are: as many as tokens, but in cross-attention."""
        return sum(run.times * run.keys for run in self.runs)

    @cached_property
    def visible(self) -> int:
        """Pairs of a query and a key it sees: 4 · width · heads FLOPs each in a forward pass, 10 in a backward."""
        return sum(run.times * _visible(run) for run in self.runs)

    def segments(self) -> list[Run]:
        return [run._replace(times=1) for run in self.runs for _ in range(run.times)]

    def recalled(self, name: str, make: Callable[["Layout"], Any]) -> Any:
        """What `make` derives from this layout, made once."""
        if name not in self.memo:
            self.memo[name] = make(self)
        return self.memo[name]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First key and end of the keys that each token sees, int32 (T,) each, on the layout's device."""
        low, high = self.recalled("bounds", _bounds)
        return low, high

    def to(self, device: torch.device) -> "Layout":
        return self.moved(lambda x: x.to(device, non_blocking=True))

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Layout":
        """With its tensors as `move` gives them."""
        q = move(self.cu_seqlens)
        k = q if self.cu_seqlens_k is self.cu_seqlens else move(self.cu_seqlens_k)
        return Layout(q, k, self.max_length, self.max_length_k, self.causal, self.kind, self.runs)


def host_bounds(layout: Layout) -> tuple[Tensor, Tensor]:
    """`Layout.bounds` on the CPU, from lengths alone."""
    runs = torch.tensor(layout.runs, dtype=torch.int64)
    rows = runs.repeat_interleave(runs[:, 0], 0)
    length, keys, prefix = rows[:, 1], rows[:, 2], rows[:, 3]
    start, start_k = (x.cumsum(0) - x for x in (length, keys))
    # Lengths [2, 3] give positions [0, 1, 0, 1, 2].
    position = torch.arange(layout.tokens) - start.repeat_interleave(length)
    low, keys, prefix = (x.repeat_interleave(length) for x in (start_k, keys, prefix))
    high = low + torch.minimum(torch.maximum(position + 1, prefix), keys)
    return low.int(), high.int()


def _bounds(layout: Layout) -> tuple[Tensor, Tensor]:
    low, high = (x.to(layout.cu_seqlens.device, non_blocking=True) for x in layout.recalled("host_bounds", host_bounds))
    return low, high


def _visible(run: Run) -> int:
    if run.prefix == run.keys:
        return run.length * run.keys
    # Under prefix 2, four tokens see 2, 2, 3 and 4 keys.
    return run.prefix**2 + (run.length * (run.length + 1) - run.prefix * (run.prefix + 1)) // 2


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
