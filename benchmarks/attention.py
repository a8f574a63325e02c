"""Forward and backward of every attention backend that runs here, over the lengths of this job, against padded SDPA.

    python benchmarks/attention.py [--tokens 65536] [--heads 12] [--width 64] [--dtype bf16] [--repeats 20] [--mix all]

Mixes: `captions` of 10 to 40 tokens, causal; `images` of 16 to 1,024 patches and a class token; `64`, `196`, `1024`:
images of one size; `mixed`: captions among images, in no order; `captioning`: patches as the prefix of a caption.
Backends take turns within each repeat; times are medians (on a CPU: processor time of one thread). TFLOP/s count
visible pairs alone (4 · width · heads forward, 10 backward). `padded` is SDPA over a batch padded beforehand, with a
mask. `bound` is the larger of useful FLOPs at the rate of a large matrix product and of bytes at the rate of a copy,
both measured here. Prints a Markdown table.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.attention import BACKENDS, Layout, attend, unsupported
from training.attention.schedule import schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Step = Callable[[], Tensor]


def _captions(draw: random.Random, tokens: int) -> Layout:
    return Layout.of(sorted(_until(tokens, lambda: draw.randint(10, 40))), causal=True)


def _images(draw: random.Random, tokens: int) -> Layout:
    return Layout.of(sorted(_until(tokens, lambda: _image(draw))))


def _mixed(draw: random.Random, tokens: int) -> Layout:
    return Layout.of(_until(tokens, lambda: _image(draw) if draw.random() < 0.5 else draw.randint(10, 40)))


def _captioning(draw: random.Random, tokens: int) -> Layout:
    images: list[int] = []
    lengths = _until(tokens, lambda: images.append(_image(draw)) or images[-1] + draw.randint(10, 40))
    return Layout.of(lengths, causal=True, prefix=images[: len(lengths)])


MIXES: dict[str, Callable[[random.Random, int], Layout]] = {
    "captions": _captions,
    "images": _images,
    "64": lambda draw, tokens: Layout.of(_until(tokens, lambda: 65)),
    "196": lambda draw, tokens: Layout.of(_until(tokens, lambda: 197)),
    "1024": lambda draw, tokens: Layout.of(_until(tokens, lambda: 1025)),
    "mixed": _mixed,
    "captioning": _captioning,
}


def _image(draw: random.Random) -> int:
    """A grid of 16 to 1,024 patches at an aspect of up to 2 to 1, and its class token."""
    rows = draw.uniform(4, 32)
    aspect = draw.uniform(0.5, 2.0) ** 0.5
    return min(max(round(rows * aspect), 1) * max(round(rows / aspect), 1), 1024) + 1


def _until(tokens: int, one: Callable[[], int]) -> list[int]:
    lengths = [one()]
    while sum(lengths) < tokens:
        lengths.append(one())
    return lengths


def _timed(step: Step, device: str) -> float:
    """Seconds."""
    if device == "cpu":
        begun = time.process_time()
        step()
        return time.process_time() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def _padded(qkv: list[Tensor], layout: Layout) -> Step:
    """Forward and backward of SDPA over (S, N, longest, H), its keys masked past each segment's end."""
    lengths = [run.length for run in layout.segments()]
    q, k, v = (
        torch.nn.utils.rnn.pad_sequence(list(x.detach().split(lengths)), batch_first=True).transpose(1, 2).contiguous()
        for x in qkv
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    at = torch.arange(layout.max_length, device=q.device)
    ends = torch.tensor(lengths, device=q.device)[:, None, None, None]
    mask = at < ends  # padded queries see the same keys, and nobody looks at them
    if layout.causal:
        prefix = torch.tensor([run.prefix for run in layout.segments()], device=q.device)[:, None, None, None]
        mask = (at[None, None, None] <= at[None, None, :, None]) | (at < prefix)
    if layout.kind == "causal" or min(lengths) == layout.max_length:  # as CLIP's towers compute it
        return lambda: _both(F.scaled_dot_product_attention(q, k, v, is_causal=layout.causal), q, k, v)
    return lambda: _both(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), q, k, v)


def _both(out: Tensor, *inputs: Tensor) -> Tensor:
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    return grads[0]


def _attended(qkv: list[Tensor], layout: Layout, name: str) -> Step:
    return lambda: _both(attend(qkv[0], qkv[1], qkv[2], layout, name), *qkv)


def _rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s of a copy."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    big = torch.empty(2**28 if device == "cuda" else 2**24, device=device)
    product = min(_timed(lambda: a @ b, device) for _ in range(10))
    copy = min(_timed(lambda: big.clone(), device) for _ in range(10))
    return 2 * size**3 / product, 2 * big.nbytes / copy


def measure(mix: str, args: argparse.Namespace, rates: tuple[float, float]) -> list[str]:
    """The table's rows of one mix."""
    device, dtype = args.device, DTYPES[args.dtype]
    layout = MIXES[mix](random.Random(7), args.tokens).to(torch.device(device))
    qkv = list(torch.randn(layout.tokens, 3, args.heads, args.width, device=device, dtype=dtype).unbind(1))
    qkv = [x.requires_grad_() for x in qkv]
    reasons = {name: unsupported(name, device, dtype, layout.kind, args.width) for name in BACKENDS}
    if device == "cpu" and reasons["triton"] is None:
        reasons["triton"] = "the interpreter's speed means nothing"
    steps = {name: _attended(qkv, layout, name) for name in BACKENDS if reasons[name] is None}
    if not args.reference:
        steps.pop("reference")
    steps = {"padded": _padded(qkv, layout)} | steps
    for step in steps.values():  # compiles, and fills caches
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(_timed(step, device))
    flops = 14 * layout.visible * args.heads * args.width
    # Forward reads q, k, v and writes o; backward reads them and do, and writes three gradients.
    moved = (4 + 8) * layout.tokens * args.heads * args.width * dtype.itemsize
    times["bound"] = [max(flops / rates[0], moved / rates[1])]
    padded = statistics.median(times["padded"])
    rows = []
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        spread = f"{min(seconds) * 1e3:.2f}–{max(seconds) * 1e3:.2f}" if len(seconds) > 1 else ""
        rows.append(
            f"| {mix} | {name} | {middle * 1e3:.2f} | {spread} | {flops / middle / 1e12:.3f} | {middle / padded:.2f} |"
        )
    useful = layout.visible / schedule(layout).cells
    big = sum(-(-run.length // 128) * -(-run.keys // 128) * 128 * 128 for run in layout.segments())
    grid = len(layout.segments()) * layout.max_length**2
    rows.append(
        f"| {mix} | *scores that are useful* | triton's tiles {useful:.0%}, tiles of 128 × 128 "
        f"{layout.visible / big:.0%}, padded {layout.visible / grid:.0%} | | | |"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", default="all", choices=["all", *MIXES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=65536 if torch.cuda.is_available() else 4096)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", default="bf16" if torch.cuda.is_available() else "fp32", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--reference", action="store_true", help="time the oracle too")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    rates = _rates(args.device, DTYPES[args.dtype])
    print(
        f"{where}, torch {torch.__version__}; {args.tokens} tokens, {args.heads} heads of {args.width}, {args.dtype};"
    )
    print(f"product {rates[0] / 1e12:.2f} TFLOP/s, copy {rates[1] / 1e9:.0f} GB/s\n")
    for name in BACKENDS:
        reason = unsupported(name, args.device, DTYPES[args.dtype], width=args.width)
        print(f"- {name} can't run: {reason}\n" if reason else "", end="")
    print("\n| lengths | backend | forward + backward, ms | least–most | useful TFLOP/s | of padded time |")
    print("| --- | --- | --- | --- | --- | --- |")
    for mix in MIXES if args.mix == "all" else [args.mix]:
        print("\n".join(measure(mix, args, rates)), flush=True)


if __name__ == "__main__":
    main()
