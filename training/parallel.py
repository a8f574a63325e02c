"""How a model lies on the ranks: whole on each (DDP), or every parameter cut along its first dimension (FSDP2).

Both average gradients over ranks, so the loop multiplies its loss by their number: what remains is a sum, whatever each
rank holds. Cut, a block's weights are whole only while it computes, and weights, gradients, moments and moving average
take 1 / ranks of their memory each, for one more gather of the weights in a step. A scalar (logit scale and bias) can't
be cut: it stays whole, and its gradient is averaged here. Weights travel in float32, so that only the order of sums
differs from DDP. arXiv 2304.11277; 2006.15704 (DDP).
"""

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from training.models.blip import PackedBlip
from training.models.clip import Towers
from training.models.transformer import Repeated

warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")


def place(model: Towers | PackedBlip, how: str, ranks: int, device: torch.device) -> None:
    """Moves the model to `device`, cut over all ranks where `how` is fsdp. One rank has nothing to cut."""
    if how == "fsdp" and ranks > 1:
        mesh = init_device_mesh(device.type, (ranks,))
        scalars = {p for p in model.parameters() if p.ndim == 0}
        for part in [*(m for m in model.modules() if isinstance(m, Repeated)), model.visual, model]:
            fully_shard(part, mesh=mesh, ignored_params=scalars)
        for p in scalars:
            p.data = p.data.to(device)
    else:
        model.to(device)


def running(model: Towers | PackedBlip, ranks: int) -> nn.Module:
    """What computes the features of the step: the model, or DDP around one that is whole."""
    if ranks == 1 or isinstance(model, FSDPModule):
        return model
    # Looking for unused parameters keeps DDP from sorting its buckets anew after the first step: with three ranks or
    # more a sum's order hangs on the place in a bucket, and a resumed run would differ in the last bit.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)


def settle(model: nn.Module) -> None:
    """Averages the gradients of what isn't cut in a model that is."""
    if isinstance(model, FSDPModule):
        for p in model.parameters():
            if not isinstance(p, DTensor) and p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


def clip(parameters: Sequence[Tensor], most: float) -> Tensor:
    """Scales the gradients down to the norm `most`, taken over all ranks; the norm before."""
    alike, cut = ([p for p in parameters if isinstance(p, DTensor) == kind] for kind in (False, True))
    norm = get_total_norm([p.grad for p in alike if p.grad is not None])
    if cut:
        square = get_total_norm([local(p.grad) for p in cut if p.grad is not None]).square()
        dist.all_reduce(square)
        norm = (norm.square() + square).sqrt()
    for kind in (alike, cut):
        clip_grads_with_norm_(kind, most, norm)
    return norm


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, share: float) -> None:
    """Moves the average by `share` of its way to the model; both are cut alike."""
    own, target = ([local(p) for p in module.parameters()] for module in (average, model))
    torch._foreach_lerp_(own, target, share)


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The module's state, put together tensor by tensor on the CPU of ranks that `keep` it. All ranks must call it."""
    found = ((name, whole(value)) for name, value in module.state_dict().items())
    return {name: value.cpu() for name, value in found if keep}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This rank's part, of a tensor that is cut."""
    return value.to_local() if isinstance(value, DTensor) else value
