"""What `probe` says about an embedding: what the same head says in torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from cluster.compute import map_shards
from cluster.guard import Guard
from filters.base import Batch, fingerprint_of
from filters.lookup import load_filter
from pairs.errors import PairmillError

DIM = 24


def saved(head: torch.nn.Module, folder: Path, prefix: str = "") -> str:
    save_file({prefix + key: value for key, value in head.state_dict().items()}, folder / "head.safetensors")
    return str(folder / "head.safetensors")


def value(settings: Mapping[str, Any], rows: list[Any]) -> list[float | None]:
    batch = Batch([str(i) for i in range(len(rows))], {"clip.image": rows})
    return list(load_filter("probe", settings).score(batch)["value"])


def embeddings(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, DIM)).astype(np.float16)


def test_a_linear_head_on_a_known_direction(tmp_path: Path) -> None:
    head = torch.nn.Linear(2, 1)
    head.load_state_dict({"weight": torch.tensor([[3.0, -1.0]]), "bias": torch.tensor([0.5])})
    settings = {"weights": saved(head, tmp_path)}
    assert value(settings, [[3, 4], None, [0, 0]]) == [pytest.approx(3 * 0.6 - 0.8 + 0.5), None, pytest.approx(0.5)]
    assert value(settings | {"normalize": False}, [[3, 4]]) == [pytest.approx(5.5)]
    assert value(settings | {"output": "sigmoid", "normalize": False}, [[0, 0.5]]) == [pytest.approx(0.5)]


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_head_like_laions_says_what_torch_says(activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    nothing = torch.nn.Dropout() if activation == "none" else torch.nn.ReLU()
    head = torch.nn.Sequential(
        torch.nn.Linear(DIM, 16), nothing, torch.nn.Linear(16, 12), nothing, *[torch.nn.Linear(12, 3)]
    ).eval()
    settings = {"weights": saved(head, tmp_path, "layers."), "activation": activation}
    rows = embeddings(9)
    with torch.no_grad():
        expected = head(F.normalize(torch.from_numpy(rows).float(), dim=-1))
    assert value(settings | {"index": 2}, list(rows)) == pytest.approx(expected[:, 2].tolist(), abs=1e-5)
    assert value(settings | {"output": "softmax"}, list(rows)) == pytest.approx(
        expected.softmax(-1)[:, 0].tolist(), abs=1e-5
    )


def test_batch_mates_change_no_bit(tmp_path: Path) -> None:
    settings = {"weights": saved(torch.nn.Linear(DIM, 1), tmp_path)}
    rows = list(embeddings(64))
    assert value(settings, rows) == [value(settings, [row])[0] for row in rows]


def test_the_engine_gives_a_wide_head_the_same_bits_whatever_threads_are_allowed(tmp_path: Path) -> None:
    """Two threads of OpenBLAS take 500 and 501 of 1001 rows, and another kernel takes the last of an odd count."""
    torch.manual_seed(0)
    settings = {"weights": saved(torch.nn.Linear(768, 1001), tmp_path), "index": 500}
    rows = list(np.random.default_rng(1).standard_normal((16, 768)).astype(np.float16))
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found += list(map_shards(partial(value, settings), [rows], engine="inline", workers=1))
    with Guard() as guard:
        found.append(guard.ask(value, settings, rows))
    assert found[0] == found[1] == found[2]


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    weights = saved(torch.nn.Linear(DIM, 1), tmp_path)
    for settings, told in [
        ({"weights": str(tmp_path / "none.safetensors")}, "no such file"),
        ({"weights": weights, "index": 1}, "an output 1"),
        ({"weights": weights, "output": "softmax"}, "two outputs"),
    ]:
        with pytest.raises(PairmillError, match=told):
            load_filter("probe", settings).content_hashes()
    with pytest.raises(PairmillError, match=r"expected 24 numbers in clip.image.*\n.*found 7"):
        value({"weights": weights}, [np.zeros(7)])


@pytest.mark.parametrize(
    "head", [torch.nn.Conv1d(3, 3, 3), torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(4, 1))]
)
def test_weights_of_no_linear_head_are_refused(head: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="linear layers"):
        value({"weights": saved(head, tmp_path)}, list(embeddings(1)))
    twice = {f"{prefix}.0.weight": torch.zeros(1, DIM) for prefix in ("a", "b")}
    save_file(twice, tmp_path / "head.safetensors")
    with pytest.raises(PairmillError, match="the second weight of layer 0"):
        value({"weights": str(tmp_path / "head.safetensors")}, list(embeddings(1)))
    (tmp_path / "head.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(PairmillError, match="linear layers"):
        value({"weights": str(tmp_path / "head.safetensors")}, list(embeddings(1)))


def test_two_heads_under_their_own_names(tmp_path: Path) -> None:
    """A recipe's `aesthetic: {kind: probe, …}`; the kind is part of the fingerprint, the name of the columns'."""
    settings = {"weights": saved(torch.nn.Linear(DIM, 1), tmp_path)}
    named = load_filter("aesthetic", settings | {"kind": "probe"})
    assert named == load_filter("probe", settings)
    assert fingerprint_of("aesthetic", load_filter("aesthetic", {"kind": "image_stats"}), {}) != fingerprint_of(
        "aesthetic", load_filter("aesthetic", {"kind": "image_hash"}), {}
    )
    for name in ("clip", "pairs", "../x", "near_duplicates"):
        with pytest.raises(PairmillError, match="a name of its own"):
            load_filter(name, settings | {"kind": "probe"})
    with pytest.raises(PairmillError, match="did you mean 'probe'"):
        load_filter("aesthetic", settings | {"kind": "prob"})
