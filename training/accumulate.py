"""One step's features over several parts of a batch, as if it had been computed whole.

A contrastive loss needs all features at once, so a sum of losses of parts would be another loss. Instead every part's
features are computed without a graph, the loss gives each feature's gradient, and a second pass over the parts
carries it into the weights: memory of one part, a third more compute (GradCache, arXiv 2101.06983). Ranks exchange
gradients once, with the last part; under FSDP2 whole gradients lie on every rank until then, and all gather weights for
each part: ranks have equally many (the loader sees to it).
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from training.parallel import settle

Part = tuple[Any, Any]  # packed images, packed texts
Features = tuple[Tensor, Tensor, Tensor, Tensor | None]  # images (B, E), texts (B, E), logit scale, logit bias
Context = Callable[[], AbstractContextManager[Any]]


def features(run: nn.Module, parts: Sequence[Part], context: Context) -> tuple[Features, Callable[[Tensor], None]]:
    """The features of all parts, and the function that takes the loss's gradient back into the weights."""
    if len(parts) == 1:
        with context():
            image_BE, text_BE, scale, bias = run(*parts[0])

        def at_once(loss: Tensor) -> None:
            loss.backward()  # type: ignore[no-untyped-call]
            settle(run)

        return (image_BE, text_BE, scale, bias), at_once
    with torch.no_grad(), context():
        found = [run(*part) for part in parts]
    images, texts, scales, biases = zip(*found, strict=True)
    leaves = [torch.cat(images), torch.cat(texts), scales[0].detach().clone()]
    leaves += [] if biases[0] is None else [biases[0].detach().clone()]
    for leaf in leaves:
        leaf.requires_grad_()

    def back(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        sizes = [len(image) for image in images]
        of_images, of_texts = (_gradient(leaf).split(sizes) for leaf in leaves[:2])
        shared = [_gradient(leaf) / len(parts) for leaf in leaves[2:]]
        for place, (part, *own) in enumerate(zip(parts, of_images, of_texts, strict=True)):
            with _sync(run, place == len(parts) - 1):
                with context():
                    outputs = [x for x in run(*part) if x is not None]
                gradients = zip(outputs, [*own, *shared], strict=True)
                learning = [(x, gradient) for x, gradient in gradients if x.requires_grad]  # a locked tower doesn't
                torch.autograd.backward(*map(list, zip(*learning, strict=True)))
        settle(run)

    return (leaves[0], leaves[1], leaves[2], leaves[3] if len(leaves) > 3 else None), back


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _sync(run: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """DDP and FSDP2 exchange gradients in the block only if `now`."""
    if isinstance(run, FSDPModule):
        run.set_requires_gradient_sync(now)
        run.set_is_last_backward(now)
    wait = getattr(run, "no_sync", None)
    return contextlib.nullcontext() if now or wait is None else wait()
