"""Compiled blocks: eager gradients, few graphs whatever the totals, in parts, with any activations kept, on ranks."""

import copy
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.utils import counters

from pairs.errors import PairmillError
from pairs.pretrain import ModelSpec
from tests.training.blip_small import TEXTS, ids, packed, pixels, tiny
from tests.training.small import MODEL, SPEC
from training import launch
from training.accumulate import features
from training.attention import Layout
from training.export import build
from training.models.blip import spans_of, stream
from training.models.clip import Towers
from training.models.transformer import Transformer, compile_blocks
from training.packing import pack_images, pack_texts
from training.parallel import place, running, whole

torch.set_num_threads(1)
CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(400)
NARROW = MODEL.model_copy(update={"text": MODEL.text.model_copy(update={"width": 16})})
GRAPHS = 2 * 2  # of a width: before and after attention, with gradients and (a first look at parts) without


def _part(seed: int) -> tuple[Any, Any]:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    grids = [(draw.randint(1, 4), draw.randint(1, 4)) for _ in range(draw.randint(2, 7))]
    patches = [torch.randint(0, 256, (h * w, 192), generator=generator, dtype=torch.uint8) for h, w in grids]
    texts = [torch.randint(0, 1000, (draw.randint(2, 16),), generator=generator) for _ in grids]
    return pack_images(patches, grids), pack_texts(texts)


def _gradients(run: torch.nn.Module, parts: list[Any], dtype: torch.dtype) -> list[torch.Tensor]:
    for parameter in run.parameters():
        parameter.grad = None
    mixed = dtype != torch.float32
    (images, texts, scale, _), back = features(run, parts, lambda: torch.autocast("cpu", dtype, enabled=mixed))
    back((images @ texts.T * scale).square().sum())
    return [p.grad for p in run.parameters() if p.grad is not None]


def _models(remember: str, spec: ModelSpec = NARROW) -> tuple[Towers, Towers]:
    eager = build(spec, 1)
    eager.visual.transformer.remember = eager.transformer.remember = remember  # type: ignore[union-attr, assignment]
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    return eager, compiled


@pytest.mark.parametrize(
    ("spec", "remember", "dtype"),
    [
        (MODEL, "all", torch.float32),
        pytest.param(NARROW, "products", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(NARROW, "inputs", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_steps_of_any_total_have_eager_gradients_and_compile_nothing_anew(
    spec: ModelSpec, remember: str, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()
    counters.clear()
    models = _models(remember, spec)
    for step in range(8):
        parts = [_part(10 * step + i) for i in range(1 + step % 2)]
        found = [_gradients(model, parts, dtype) for model in models]
        for eager, compiled in zip(*found, strict=True):
            error = (eager - compiled).norm() / eager.norm().clamp(min=1e-6)
            assert error < (1e-5 if dtype == torch.float32 else 0.05)
        if step == 1:
            graphs = counters["stats"]["unique_graphs"]
    widths = len({spec.vision.width, spec.text.width})
    assert counters["stats"]["unique_graphs"] == graphs == GRAPHS * widths and not counters["graph_break"]


@pytest.mark.slow
def test_so_have_a_blip_s_text_layers() -> None:
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = tiny().double(), tiny().double()  # a key's bias has no gradient but rounding
    compile_blocks(compiled)
    for step in range(4):
        images = packed(pixels(3 + step, seed=step))
        spans, texts = spans_of(images), ids(TEXTS)[: 3 + step]
        for model in (eager, compiled):
            model.zero_grad()
            states = model.visual(images)
            looks = [stream(texts, CPU, spans[: len(texts)], causal=causal) for causal in (False, True)]
            found = [*model.text(looks, states), *model.text([stream(texts, CPU)])]
            torch.cat(found).square().mean().backward()
        if step == 1:
            graphs = counters["stats"]["unique_graphs"]
        for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
            if one.grad is not None:
                assert other.grad is not None
                assert (one.grad - other.grad).norm() < 1e-10 * one.grad.norm().clamp(min=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def _bytes_kept(tower: Transformer) -> int:
    layout = Layout.of([5, 9, 30])
    weights = {p.data_ptr() for p in tower.parameters()}
    kept: dict[int, int] = {}

    def seen(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    alive = torch.randn(44, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
        out = tower(alive, layout)
    assert out.requires_grad
    return sum(kept.values()) // 44 // 32


def test_compiled_blocks_keep_no_more_than_is_asked_for() -> None:
    kept = {}
    for remember in ("all", "products", "inputs"):
        tower = Transformer(32, 1, 2, "sdpa")
        tower.remember = remember
        compile_blocks(tower)
        kept[remember] = _bytes_kept(tower)
    assert kept["inputs"] < 10 < kept["products"] < 50 < kept["all"] < 75


def _on_rank(rank: int, ranks: int, root: str, how: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=ranks)
    found = []
    for model in _models("all"):
        place(model, how, ranks, torch.device("cpu"))
        gradients = _gradients(running(model, ranks), [_part(rank)], torch.float32)
        found.append([whole(x).clone() for x in gradients])
    if rank == 0:
        torch.save(found, f"{root}/found.pt")
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_so_do_ranks(tmp_path: Path, how: str) -> None:
    mp.start_processes(_on_rank, (2, str(tmp_path), how), nprocs=2, start_method="spawn")
    for eager, compiled in zip(*torch.load(tmp_path / "found.pt"), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))


def test_a_missing_compiler_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPEC.model_copy(update={"compile": True})
    monkeypatch.delenv("CXX", raising=False)
    launch.preflight(spec)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PairmillError, match=r"a compiler for pretrain\.compile"):
        launch.preflight(spec)
    launch.preflight(SPEC)
