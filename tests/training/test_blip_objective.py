"""BLIP's losses against a plain version with loops and lists, over steps; and alike on any number of ranks."""

import copy
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from pairs.identity import unit_hash
from tests.training.blip_small import TEXTS, ids, packed, pixels, tiny
from training.blip_momentum import Memory
from training.blip_objective import Aims, Entry, draw, keys_of, losses, pairs_of, ramped, total
from training.models.blip import PackedBlip, spans_of, stream
from training.parallel import place, running, settle, whole, whole_state

torch.set_num_threads(1)
COUNTS = {1: (9,), 2: (1, 8), 4: (2, 5, 1, 1)}
SHUFFLED = [4, 8, 0, 3, 7, 1, 6, 2, 5]  # how ranks get the pairs
DAMAGED = 3
AIMS = Aims(match=6, write=5, prompt=(24,), unknown=9, context=9)
CPU, PLACES, RATE, ALPHA = torch.device("cpu"), 20, 0.05, 0.4


def entry(step: int, i: int) -> Entry:
    """Pair i of a step: 9 pairs of 6 texts; its row comes again three steps later."""
    text = (i + step) % 6
    row = step % 3 * 9 + i
    return Entry(row, f"uid{row}", text, ids(TEXTS)[text])


def picture(step: int, i: int) -> torch.Tensor:
    return pixels(1, seed=100 + 9 * (step % 3) + i)[0].double()


def one_step(run: torch.nn.Module, model: PackedBlip, memory: Memory, step: int, rank: int, ranks: int) -> torch.Tensor:
    counts, shuffled = COUNTS[ranks], iter(SHUFFLED)
    split = [[next(shuffled) for _ in range(count)] for count in counts]
    images = packed(torch.stack([picture(step, i) for i in split[rank]]))
    entries = [[entry(step, i) for i in part] for part in split]
    valid = torch.tensor([i != DAMAGED for i in split[rank]])
    pairs = pairs_of(entries, rank, spans_of(images), valid, 7, step)
    run.zero_grad()  # not after the forward pass, when a cut model's root is whole
    memory.follow(model)
    keys = keys_of(memory, images, pairs)
    parts = run(lambda it: losses(it, images, pairs, keys, AIMS, ramped(ALPHA, step, 2)))
    loss, _, told = total(parts, pairs.valid_B, ranks)
    (loss * ranks / (len(SHUFFLED) - 1)).backward()
    settle(run)
    memory.push(keys)
    return torch.tensor([told[name] for name in ("itc", "itm", "lm")], dtype=torch.float64)


def _train(rank: int, ranks: int, folder: str, start: int, steps: int, how: str = "ddp") -> None:
    torch.set_num_threads(1)
    model = tiny().double()
    memory = Memory(model, PLACES, 0.9).double()
    held = torch.nn.ModuleDict({"model": model, "memory": memory})
    if start:
        held.load_state_dict(torch.load(f"{folder}/state{start}.pt"))
    if ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        meet = f"file://{folder}/meet{ranks}-{start}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
        for module in (model, memory.encoders):
            place(module, how, ranks, CPU)
    run, told = running(model, ranks), []
    for step in range(start, steps):
        told.append(one_step(run, model, memory, step, rank, ranks))
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= RATE * p.grad
    gradients = {f"grad {name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    state = whole_state(held, keep=True)
    if rank == 0:
        torch.save({"told": torch.stack(told)} | gradients | state, f"{folder}/{ranks}-{start}.pt")
        torch.save(state, f"{folder}/state{steps}.pt")
    if ranks > 1:
        dist.barrier()
        os._exit(0)  # the interpreter's end may meet gloo's threads (SIGABRT), after all is done


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], names: set[str]) -> None:
    for name in sorted(names):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_uneven_counts_train_what_one_process_trains(tmp_path: Path, ranks: int, how: str) -> None:
    _train(0, 1, str(tmp_path), 0, 4)
    mp.start_processes(_train, (ranks, str(tmp_path), 0, 4, how), nprocs=ranks, start_method="spawn")
    one, several = (torch.load(tmp_path / f"{n}-0.pt") for n in (1, ranks))
    assert len([name for name in one if name.startswith("grad")]) == len(list(tiny().parameters()))
    assert all(one[name].abs().max() > 0 for name in one if name.startswith("grad"))
    assert int(one["memory.seen"]) == 4 * 8 and one["told"].isfinite().all()
    _same(several, one, set(one))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    _train(0, 1, str(tmp_path), 0, 4)
    whole = torch.load(tmp_path / "1-0.pt")
    mp.start_processes(_train, (2, str(tmp_path), 0, 2), nprocs=2, start_method="spawn")
    _train(0, 1, str(tmp_path), 2, 4)
    _same(torch.load(tmp_path / "1-2.pt"), whole, set(whole) - {"told"})


class Plain:
    """The same training with loops: lists for the ring, one pass for each text and image."""

    def __init__(self, model: PackedBlip) -> None:
        self.model, self.slow = model, copy.deepcopy(model)
        self.ring: list[tuple[torch.Tensor, torch.Tensor, int, int]] = []

    def features(self, of: PackedBlip, step: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = packed(picture(step, i)[None])
        text = stream([entry(step, i).ids], CPU)
        return of.image_features(of.visual(images), images)[0], of.text_features(text)[0]

    def match(self, step: int, image: int, text: int) -> torch.Tensor:
        images, words = packed(picture(step, image)[None]), entry(step, text).ids.clone()
        words[0] = AIMS.match
        look = stream([words], CPU, spans_of(images))
        return self.model.matches(self.model.text([look], self.model.visual(images))[0], look)[0]

    def write(self, step: int, i: int) -> list[torch.Tensor]:
        words = torch.cat([torch.tensor([AIMS.write, *AIMS.prompt]), entry(step, i).ids[1:]])
        words = torch.cat([words[:8], words[-1:]]) if len(words) > 9 else words
        images = packed(picture(step, i)[None])
        look = stream([words[:-1]], CPU, spans_of(images), causal=True)
        logits = self.model.words(self.model.text([look], self.model.visual(images))[0])
        kept = [t for t in range(1, len(words) - 1) if words[t + 1] != AIMS.unknown]
        return [F.cross_entropy(logits[t], words[t + 1], label_smoothing=0.1) for t in kept]

    def step(self, step: int) -> dict[str, torch.Tensor]:
        slow = dict(self.slow.named_parameters())
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                slow[name].copy_(0.9 * slow[name] + 0.1 * p)
        fine = [i for i in range(9) if i != DAMAGED]
        with torch.no_grad():
            new = [(*self.features(self.slow, step, i), entry(step, i).row, entry(step, i).text) for i in fine]
        alpha, far, itc, itm = ALPHA * min(1.0, step / 2), new + self.ring, [], []
        for at, i in enumerate(fine):
            row, text = new[at][2:]
            held = [j for j, k in enumerate(far) if j == at or (k[2] != row and k[3] != text)]
            for mine, other in ((0, 1), (1, 0)):
                query = self.features(self.model, step, i)[mine]
                logits = torch.stack([query @ far[j][other] for j in held]) * self.model.logit_scale.exp()
                guess = torch.stack([new[at][mine] @ far[j][other] for j in held]) * self.model.logit_scale.exp()
                target = alpha * guess.detach().softmax(0)
                target[held.index(at)] += 1 - alpha
                itc.append(-(logits.log_softmax(0) * target).sum() / 2)
                in_step = [j for j in held if j < len(new)]
                chance = torch.stack([query @ new[j][other] for j in in_step]) * self.model.logit_scale.exp()
                shares = (chance.detach().softmax(0) + 1e-4).tolist()
                weights = [(j, w) for j, w in zip(in_step, shares, strict=True) if j != at]
                draws = unit_hash(7, step, entry(step, i).uid, ("text", "image")[mine])
                left = draws * sum(w for _, w in weights)
                for j, w in weights:
                    wrong, left = fine[j], left - w
                    if left < 0:
                        break
                pair = (i, wrong) if mine == 0 else (wrong, i)
                itm.append(F.cross_entropy(self.match(step, *pair), torch.tensor(0)))
            itm.append(F.cross_entropy(self.match(step, i, i), torch.tensor(1)))
        self.ring = (self.ring + new)[-PLACES:]  # each new one after the older; their order there changes no sum
        written = [each for i in fine for each in self.write(step, i)]
        return {"itc": torch.stack(itc).sum() / 8, "itm": torch.stack(itm).mean(), "lm": torch.stack(written).mean()}


def test_losses_momentum_and_ring_are_those_of_loops_and_lists() -> None:
    model = tiny().double()
    memory, plain = Memory(model, PLACES, 0.9).double(), Plain(copy.deepcopy(model))
    for step in range(4):  # the ring is full after the third, and its oldest fall out
        told = one_step(model, model, memory, step, 0, 1)
        expected = plain.step(step)
        for found, name in zip(told, ("itc", "itm", "lm"), strict=True):
            torch.testing.assert_close(found, expected[name].detach(), rtol=1e-9, atol=1e-11)
        plain.model.zero_grad()
        torch.stack(list(expected.values())).sum().backward()
        for (name, p), q in zip(model.named_parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11, msg=name)
            with torch.no_grad():
                p -= RATE * p.grad
                q -= RATE * q.grad
        ring = zip(memory.image_QE, memory.text_QE, memory.same_Q2.tolist(), strict=True)
        held = {(row, text): (a, b) for a, b, (row, text) in ring if row >= 0}
        assert held.keys() == {(r, t) for _, _, r, t in plain.ring} and len(plain.ring) == min(PLACES, 8 * (step + 1))
        for image, text, row, number in plain.ring:
            torch.testing.assert_close(held[row, number][0], image, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(held[row, number][1], text, rtol=1e-9, atol=1e-12)


def test_draws_follow_the_weights_and_never_take_what_is_excluded() -> None:
    similar = torch.tensor([[4.0, 3.0, 0.0, 3.0, -9.0]])
    excluded = torch.tensor([[True, False, False, False, True]])
    uniform = torch.arange(2000, dtype=torch.float64) / 2000
    drawn = Counter(draw(similar.expand(2000, -1), excluded.expand(2000, -1), uniform).tolist())
    assert set(drawn) == {1, 2, 3} and abs(drawn[1] - drawn[3]) < 3 and drawn[2] < 150
    top = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(similar, excluded, top).item() == 3 and draw(similar, excluded, 0 * top).item() == 1
    assert draw(similar, torch.ones(1, 5, dtype=torch.bool), top).item() == -1


def test_the_ring_keeps_the_last_of_more_than_it_holds() -> None:
    memory = Memory(tiny(), 5)
    width = memory.image_QE.shape[1]
    for first in (0, 3, 6):
        values = torch.arange(first, first + (3 if first < 6 else 8)).float()
        features = values[:, None].expand(-1, width)
        same, valid = values[:, None].expand(-1, 2).long(), values != 4
        memory.push(memory.keys(features, -features, same, valid))
        if first == 3:  # 0 1 2 3 5: the fourth was damaged
            assert memory.image_QE[:, 0].tolist() == [0, 1, 2, 3, 5] and int(memory.seen) == 5
    assert sorted(memory.image_QE[:, 0].tolist()) == [9, 10, 11, 12, 13] and int(memory.seen) == 13
    assert torch.equal(memory.image_QE, -memory.text_QE) and memory.image_QE[13 % 5 - 1, 0] == 13


def test_all_of_one_text_have_no_wrong_ones_and_still_train() -> None:
    model, images = tiny(), packed(pixels(3))
    entries = [[Entry(i, str(i), 0, ids(TEXTS)[0]) for i in range(3)]]
    pairs = pairs_of(entries, 0, spans_of(images), torch.tensor([True, True, False]), 0, 0)
    memory = Memory(model, 4)
    found = losses(model, images, pairs, keys_of(memory, images, pairs), AIMS, 0.4)
    assert [int(count) for _, count in found.values()] == [2, 2, 2 * 4]
    total(found, pairs.valid_B, 1)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("asked", [{"lm"}, {"itc", "itm"}, {"itc", "itm", "lm"}], ids=sorted)
def test_what_trains_is_what_the_losses_reach(asked: set[str]) -> None:
    model, images = tiny(), packed(pixels(6))
    entries = [[Entry(i, str(i), i, text) for i, text in enumerate(ids(TEXTS))]]
    pairs = pairs_of(entries, 0, spans_of(images), torch.ones(6, dtype=torch.bool), 0, 0)
    keys = keys_of(Memory(model, 4), images, pairs) if "itc" in asked else None
    total(losses(model, images, pairs, keys, replace(AIMS, losses=frozenset(asked)), 0.4), pairs.valid_B, 1)[
        0
    ].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.only(asked)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == reached


def test_under_autocast_contrast_stays_in_float32_and_losses_near() -> None:
    model, images = tiny(), packed(pixels(6))
    entries = [[Entry(i, str(i), i, text) for i, text in enumerate(ids(TEXTS))]]
    pairs = pairs_of(entries, 0, spans_of(images), torch.ones(6, dtype=torch.bool), 0, 0)
    found = []
    for enabled in (False, True):
        memory = Memory(model, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            keys = keys_of(memory, images, pairs)
            parts = losses(model, images, pairs, keys, AIMS, 0.4)
        assert all(value.dtype == torch.float32 for value, _ in parts.values()) and keys.image_KE.dtype == torch.float32
        found.append(torch.stack([value / count for value, count in parts.values()]))
        total(parts, pairs.valid_B, 1)[0].backward()
        memory.push(keys)
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)
