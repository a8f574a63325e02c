"""Starts a training in processes of its own, streams its lines, and leaves none of them behind.

Of its own, because training takes all cores' threads and its memory must go with it. The ranks of a CLIP are started
directly, with the variables that torchrun sets (`torchrun -m training.run` works too): torchrun's agent would cost
another import of torch and a socket that listens on every interface. Here ranks meet through a file, and gloo is bound
to loopback. A rank dies with this process, and all die with any one.
Calling it again after a kill resumes; after the end it returns at once.
"""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pairs.errors import PairmillError
from pairs.pretrain import PretrainSpec
from pairs.process import ROOT, child
from training.config import RESULT, BlipJob, BlipResult, Job, TrainConfig, TrainResult, identity

Line = dict[str, Any]
OnLine = Callable[[Line], None]
Process = subprocess.Popen[bytes]
NVIDIA = Path("/dev/nvidiactl")  # there wherever CUDA can be
START = "--- this rank starts"  # in its log, which holds those of earlier tries too
MAX_PIXELS = "200000000"  # what OpenCV may decode


def train(config: TrainConfig, on_line: OnLine = lambda line: None) -> TrainResult:
    """Trains to the end, from the last checkpoint in `out_dir` where there is one. `on_line` gets a dict per step.

    Leaving it by an exception (also one that `on_line` raises) ends every rank. Raises PairmillError for what
    the user can mend; logs of the ranks lie in `out_dir`/logs.
    """
    finished = _finished(config)
    if finished:
        return finished
    return TrainResult.model_validate(_run(config, config.spec.workers, on_line))


def train_blip(job: BlipJob, on_line: OnLine = lambda line: None) -> BlipResult:
    """Trains captioner and match filter as `train` trains a CLIP."""
    return BlipResult.model_validate(_run(job, 1, on_line))


def _run(job: Job, ranks: int, on_line: OnLine) -> Line:
    """Starts the job's processes and hands on their lines; what they have done."""
    out = Path(job.out_dir)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    path.write_text(job.model_dump_json(indent=2))
    with tempfile.TemporaryDirectory() as meeting, _ranks(ranks, path, meeting, out / "logs") as processes:
        for line in _lines(processes, out / "logs"):
            if "done" in line:
                return dict(line["done"])
            if "error" in line:
                raise PairmillError(**line["error"])
            on_line(line)
    raise AssertionError("lines end by a result or an error")


def preflight(spec: PretrainSpec) -> None:
    """Raises PairmillError where what `spec` names can't run on this machine: a compiler, workers, precision, attention
    at the towers' head widths. Ranks find out the rest themselves (`training.preflight`)."""
    if spec.compile:
        _check_compiler()
    if spec.precision != "bf16" and spec.attention in ("auto", "reference", "sdpa") and not NVIDIA.exists():
        return  # nothing can fail, and to import torch takes seconds
    import torch

    from training.attention import unsupported
    from training.hardware import check_gpus, precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_gpus(spec.workers)
    dtype = precision(spec, device)
    towers = (spec.model.vision, "full"), (spec.model.text, "causal" if spec.model.kind == "clip" else "full")
    for tower, kind in () if spec.attention == "auto" else towers:
        reason = unsupported(spec.attention, device.type, dtype, kind, tower.width // tower.heads)
        if reason:
            raise PairmillError(
                expected=f"attention backend {spec.attention!r} to run", found=reason, remedy="use attention: auto"
            )


def _check_compiler() -> None:
    """torch.compile writes C++ for a CPU; for a GPU Triton writes kernels, and C to launch them."""
    names = ["gcc", "clang"] if NVIDIA.exists() else ["g++"]
    chosen = os.environ.get("CC" if NVIDIA.exists() else "CXX", "").split()[:1]
    if not any(map(shutil.which, chosen or names)):
        raise PairmillError(
            expected=f"a compiler for pretrain.compile: {' or '.join(chosen or names)}",
            found="none on the PATH",
            remedy="install one (Debian: g++), or set compile: false",
        )


def _finished(config: TrainConfig) -> TrainResult | None:
    """The result of a run that ended before, where its model is of this very config and these very starts."""
    card, result = Path(config.out_dir) / "model" / "model_card.json", Path(config.out_dir) / RESULT
    if not card.exists() or not result.exists():
        return None
    own, held = identity(config), json.loads(card.read_text())
    if any(held.get(name) != own.get(name) for name in ("config", "starts")):
        return None
    found = TrainResult.model_validate_json(result.read_text())
    return found if found.fingerprint == config.fingerprint else None


@contextlib.contextmanager
def _ranks(count: int, config: Path, meeting: str, logs: Path) -> Iterator[list[Process]]:
    """`count` running ranks; when the block is left, however, they are gone."""
    shared = {
        "WORLD_SIZE": str(count),
        "PAIRMILL_RENDEZVOUS": f"file://{meeting}/ranks",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        "OPENCV_IO_MAX_IMAGE_PIXELS": MAX_PIXELS,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "training.run", str(config)]
    with contextlib.ExitStack() as stack:
        ranks: list[Process] = []
        for rank in range(count):
            log = stack.enter_context((logs / f"rank{rank}.log").open("ab"))
            log.write(f"{START}\n".encode())
            log.flush()
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            running = child(command, environment=own, stdout=subprocess.PIPE, stderr=log, patience_s=0)
            ranks.append(stack.enter_context(running))
        yield ranks


def _lines(ranks: list[Process], logs: Path) -> Iterator[Line]:
    """The JSON lines of all ranks as they come, until rank 0 is done; raises where a rank dies without one."""
    lines: queue.Queue[tuple[int, bytes]] = queue.Queue()
    for rank, process in enumerate(ranks):
        threading.Thread(target=_read, args=(rank, process, lines), daemon=True).start()
    while True:
        rank, text = lines.get()
        if text.startswith(b"{"):  # libraries print too
            yield json.loads(text)
        elif text:
            continue
        elif ranks[rank].wait() != 0 or rank == 0:
            log = logs / f"rank{rank}.log"
            own = log.read_text().rpartition(START)[2]
            end = [line for line in own.splitlines() if line.strip()][-3:]
            raise PairmillError(
                expected=f"rank {rank} of the training to finish",
                found=f"exit code {ranks[rank].returncode}: {' / '.join(end) or 'no message'}",
                remedy=f"see {log}; the same command resumes after the last checkpoint",
            )


def _read(rank: int, process: Process, lines: "queue.Queue[tuple[int, bytes]]") -> None:
    assert process.stdout
    with process.stdout:
        for text in process.stdout:
            lines.put((rank, text))
    lines.put((rank, b""))
