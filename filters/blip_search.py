"""How captions are searched for: greedily, by draws from the nucleus, or by beams, for many images at a time.

What is computed for all slots together (`pick`) is a tensor's work of a fixed shape; what becomes of each image's texts
is plain Python. Beams are those of transformers' `generate` (scores are sums of log-chances over length to the power
of `length_penalty`), but an image stops when it can't improve, whatever the others do. Nucleus: arXiv 1904.09751.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from filters.blip_decoder import Decoder

LIKELIEST = 256  # tokens that a nucleus is looked for in, before all are sorted
UNBORN = -1e9  # the score of beams that nothing has branched into yet

Tokens = list[int]


class Search(Protocol):
    """The texts of one image as they grow: `step` new tokens so far."""

    done: bool
    step: int

    def advance(self, picked: Any) -> tuple[list[int], Tokens]:
        """Takes what was picked for its texts; returns which text each goes on from, and its next token."""

    def found(self) -> list[Tokens | None]:
        """The texts' new tokens without [SEP]; None where no end was reached."""


class Samples:
    """`texts` that grow on their own; `draw(text, step)` is what decides in the nucleus."""

    def __init__(self, texts: int, most: int, end: int, draw: Callable[[int, int], float]) -> None:
        self.written: list[Tokens] = [[] for _ in range(texts)]
        self.most, self.end, self.draw, self.done, self.step = most, end, draw, False, 0

    def draws(self) -> list[float]:
        return [self.draw(text, self.step) for text in range(len(self.written))]

    def advance(self, picked: Tokens) -> tuple[list[int], Tokens]:
        for text, token in zip(self.written, picked, strict=True):
            text += [] if text[-1:] == [self.end] else [token]
        self.step += 1
        self.done = self.step == self.most or all(text[-1] == self.end for text in self.written)
        return list(range(len(picked))), picked

    def found(self) -> list[Tokens | None]:
        return [text[:-1] if text[-1] == self.end else None for text in self.written]


class Beams:
    """The `beams` likeliest texts; `best` of them are wanted."""

    def __init__(self, beams: int, best: int, most: int, end: int, penalty: float, early: bool) -> None:
        self.scores, self.open = [0.0] + [UNBORN] * (beams - 1), [Tokens() for _ in range(beams)]
        self.ended: list[tuple[float, Tokens]] = []
        self.beams, self.best, self.most, self.end, self.penalty, self.early = beams, best, most, end, penalty, early
        self.done, self.step = False, 0

    def advance(self, picked: list[tuple[float, int, int]]) -> tuple[list[int], Tokens]:
        """`picked`: the best 2 * `beams` continuations as (score, beam, token), falling."""
        self.step += 1
        norm, last = self.step**self.penalty, self.step == self.most
        grown = [(score, beam, [*self.open[beam], token]) for score, beam, token in picked]
        self.ended += [(score / norm, text) for score, _, text in grown[: self.beams] if last or text[-1] == self.end]
        self.ended = sorted(self.ended, key=lambda one: -one[0])[: self.beams]
        going = [one for one in grown if one[2][-1] != self.end][: self.beams]
        self.scores, parents, self.open = (list(each) for each in zip(*going, strict=True))  # type: ignore[assignment]
        full = len(self.ended) == self.beams
        self.done = last or (full and (self.early or self.scores[0] / norm <= self.ended[-1][0]))
        return parents, [text[-1] for text in self.open]  # type: ignore[return-value]

    def found(self) -> list[Tokens | None]:
        return [text[:-1] if text[-1] == self.end else None for _, text in self.ended[: self.best]]


Pick = Callable[[torch.Tensor, Sequence[Search | None]], Sequence[Any]]


def pick_likeliest(chance_SGV: torch.Tensor, _searches: Sequence[Search | None]) -> Sequence[Any]:
    return chance_SGV.argmax(-1).tolist()  # type: ignore[no-any-return]


def pick_from_nucleus(chance_SGV: torch.Tensor, searches: Sequence[Any], top_p: float) -> Sequence[Any]:
    draws = [one.draws() if one else [0.0] * chance_SGV.shape[1] for one in searches]
    draws_SG = torch.tensor(draws, device=chance_SGV.device)
    drawn = nucleus(chance_SGV.flatten(0, 1), top_p, draws_SG.flatten())
    return drawn.view_as(draws_SG).tolist()  # type: ignore[no-any-return]


def nucleus(chance_RV: torch.Tensor, top_p: float, draws_R: torch.Tensor) -> torch.Tensor:
    """A token of each row, (R,): of the likeliest that hold `top_p` of the chance, that at `draws` in [0, 1) of it."""
    chance = chance_RV.softmax(-1)
    likeliest, order = chance.topk(min(LIKELIEST, chance.shape[-1]))
    tokens = _drawn(likeliest, order, top_p, draws_R)
    if (wide := likeliest.cumsum(-1)[:, -1] < top_p).any():
        likeliest, order = chance[wide].sort(descending=True, stable=True)
        tokens[wide] = _drawn(likeliest, order, top_p, draws_R[wide])
    return tokens


def _drawn(chance: torch.Tensor, order: torch.Tensor, top_p: float, draws: torch.Tensor) -> torch.Tensor:
    below = chance.cumsum(-1) - chance
    mass = chance.masked_fill(below >= top_p, 0.0).cumsum(-1)
    place = (mass <= draws[:, None] * mass[:, -1:]).sum(-1).minimum((below < top_p).sum(-1) - 1)
    return order.gather(-1, place[:, None])[:, 0]


def pick_beams(chance_SGV: torch.Tensor, searches: Sequence[Any]) -> Sequence[Any]:
    beams, words = chance_SGV.shape[1:]
    so_far = [one.scores if one else [0.0] * beams for one in searches]
    sums = chance_SGV + torch.tensor(so_far, device=chance_SGV.device)[..., None]
    scores, places = (each.tolist() for each in sums.flatten(1).topk(2 * beams))
    return [
        [(s, p // words, p % words) for s, p in zip(*each, strict=True)] for each in zip(scores, places, strict=True)
    ]


@torch.inference_mode()
def write(
    decoder: Decoder,
    images: Iterator[torch.Tensor],
    prompt: Tokens,
    searches: Sequence[Search],
    pick: Pick,
    least: int,
    end: int,
) -> None:
    """Brings each image's search to its end. `prompt` begins every text; `images` are patches (N, E); `end` may not
    be among the `least` first tokens."""
    G, waiting = decoder.texts, iter(searches)
    slots: list[Search | None] = [None] * decoder.slots
    places, tokens, own = [0] * decoder.slots, [prompt[:1] * G] * decoder.slots, list(range(G))
    seen = torch.zeros(decoder.slots, G, decoder.length, G, dtype=torch.bool, device=decoder.device)
    while True:
        for s in [s for s, one in enumerate(slots) if one is None]:
            if (one := next(waiting, None)) is not None:
                slots[s], decoder.images_SNE[s] = one, next(images)
        if not any(slots):
            return
        place_S = torch.tensor(places, device=decoder.device)
        seen[decoder.all, :, place_S] = torch.eye(G, dtype=torch.bool, device=decoder.device)
        logits = decoder.step(torch.tensor(tokens, device=decoder.device), place_S, seen)
        ripe = [one if place + 1 >= len(prompt) else None for one, place in zip(slots, places, strict=True)]
        chance, young = logits.log_softmax(-1), [s for s, one in enumerate(ripe) if one and one.step < least]
        chance[young, :, end] = -torch.inf
        picked, parents = pick(chance, ripe) if any(ripe) else [], [own] * len(slots)
        for s, one in enumerate(ripe):
            if one is None:
                places[s] += slots[s] is not None
                tokens[s] = prompt[places[s] :][:1] * G
                continue
            parents[s], tokens[s] = one.advance(picked[s])
            places[s] += 1
            if one.done:
                slots[s], places[s], tokens[s], seen[s] = None, 0, prompt[:1] * G, False
        if any(each != own for each in parents):
            seen = seen[decoder.all[:, None], torch.tensor(parents, device=decoder.device)]
