"""One step's features over several parts of a batch, as if it had been computed whole.

A contrastive loss needs all features at once, so a sum of losses of parts would be another loss. Instead every part's
features are computed without a graph, the loss gives each feature's gradient, and a second pass over the parts
carries it into the weights: memory of one part, a third more compute (GradCache, arXiv 2101.06983). Ranks exchange
gradients once, with the last part.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

Part = tuple[Any, Any]  # packed images, packed texts
Features = tuple[Tensor, Tensor, Tensor, Tensor | None]  # images (B, E), texts (B, E), logit scale, logit bias
Context = Callable[[], AbstractContextManager[Any]]


def features(run: nn.Module, parts: Sequence[Part], context: Context) -> tuple[Features, Callable[[Tensor], None]]:
    """The features of all parts, and the function that takes the loss's gradient back into the weights."""
    if len(parts) == 1:
        with context():
            image_BE, text_BE, scale, bias = run(*parts[0])
        return (image_BE, text_BE, scale, bias), lambda loss: loss.backward()  # type: ignore[no-untyped-call]
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
        for place, part in enumerate(parts):
            with _sync(run, place == len(parts) - 1):
                with context():
                    outputs = [x for x in run(*part) if x is not None]
                torch.autograd.backward(outputs, [of_images[place], of_texts[place], *shared])

    return (leaves[0], leaves[1], leaves[2], leaves[3] if len(leaves) > 3 else None), back


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _sync(run: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """DDP exchanges gradients in the block only if `now`."""
    wait = getattr(run, "no_sync", None)
    return contextlib.nullcontext() if now or wait is None else wait()
