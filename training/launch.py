"""Starts a training run in processes of its own, streams its lines, and leaves none of them behind.

The ranks are started directly, with the variables that torchrun sets (`torchrun -m training.run` works too):
torchrun's agent would cost another import of torch and a socket that listens on every interface. Here ranks meet
through a file, and gloo is bound to loopback. A rank dies with this process, and all die with any one.
Calling `train` again after a kill resumes; after the end it returns at once.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pairs.errors import PairmillError
from pairs.recipe import PretrainSpec
from training.config import RESULT, TrainConfig, TrainResult

Line = dict[str, Any]
NVIDIA = Path("/dev/nvidiactl")  # there wherever CUDA can be
START = "--- this rank starts"  # in its log, which holds those of earlier tries too
MAX_PIXELS = "200000000"  # what OpenCV may decode


def train(config: TrainConfig, on_line: Callable[[Line], None] = lambda line: None) -> TrainResult:
    """Trains to the end, from the last checkpoint in `out_dir` where there is one. `on_line` gets a dict per step.

    Leaving it by an exception (also one that `on_line` raises) ends every rank. Raises PairmillError for what
    the user can mend; logs of the ranks lie in `out_dir`/logs.
    """
    finished = _finished(config)
    if finished:
        return finished
    out = Path(config.out_dir)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    path.write_text(config.model_dump_json(indent=2))
    with tempfile.TemporaryDirectory() as meeting, _ranks(config.spec.workers, path, meeting, out / "logs") as ranks:
        for line in _lines(ranks, out / "logs"):
            if "done" in line:
                return TrainResult.model_validate(line["done"])
            if "error" in line:
                raise PairmillError(**line["error"])
            on_line(line)
    raise AssertionError("rank 0 ended without a result")


def preflight(spec: PretrainSpec) -> None:
    """Raises PairmillError where what `spec` names can't run on this machine: workers, precision, attention."""
    if spec.precision != "bf16" and spec.attention != "varlen" and not NVIDIA.exists():
        return  # nothing can fail, and to import torch takes seconds
    import torch

    from training.attention import unsupported
    from training.run import check_gpus, precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_gpus(spec.workers)
    dtype = precision(spec, device)
    reason = None if spec.attention == "auto" else unsupported(spec.attention, device.type, dtype)
    if reason:
        raise PairmillError(
            expected=f"attention backend {spec.attention!r} to run", found=reason, remedy="use attention: auto"
        )


def _finished(config: TrainConfig) -> TrainResult | None:
    """The result of a run that ended before, where its model is of this very config."""
    card, result = Path(config.out_dir) / "model" / "model_card.json", Path(config.out_dir) / RESULT
    if not card.exists() or not result.exists() or json.loads(card.read_text())["config"] != config.fingerprint:
        return None
    found = TrainResult.model_validate_json(result.read_text())
    return found if found.fingerprint == config.fingerprint else None


@contextlib.contextmanager
def _ranks(count: int, config: Path, meeting: str, logs: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """`count` running ranks; when the block is left, however, they are gone."""
    shared = {
        "WORLD_SIZE": str(count),
        "PAIRMILL_RENDEZVOUS": f"file://{meeting}/ranks",
        "PAIRMILL_PARENT": str(os.getpid()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        "OPENCV_IO_MAX_IMAGE_PIXELS": MAX_PIXELS,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with contextlib.ExitStack() as stack:
        ranks: list[subprocess.Popen[str]] = []
        for rank in range(count):
            log = stack.enter_context((logs / f"rank{rank}.log").open("a"))
            log.write(f"{START}\n")
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "training.run", str(config)],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            ranks.append(process)
            stack.callback(_end, process)
        yield ranks


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def _lines(ranks: list["subprocess.Popen[str]"], logs: Path) -> Iterator[Line]:
    """The JSON lines of all ranks as they come, until rank 0 is done; raises where a rank dies without one."""
    lines: queue.Queue[tuple[int, str]] = queue.Queue()
    for rank, process in enumerate(ranks):
        threading.Thread(target=_read, args=(rank, process, lines), daemon=True).start()
    while True:
        rank, text = lines.get()
        if text.startswith("{"):  # libraries print too
            yield json.loads(text)
        elif text:
            continue
        elif ranks[rank].wait() != 0:
            log = logs / f"rank{rank}.log"
            own = log.read_text().rpartition(START)[2]
            end = [line for line in own.splitlines() if line.strip()][-3:]
            raise PairmillError(
                expected=f"rank {rank} of the training run to finish",
                found=f"exit code {ranks[rank].returncode}: {' / '.join(end) or 'no message'}",
                remedy=f"see {log}; the same command resumes after the last checkpoint",
            )


def _read(rank: int, process: "subprocess.Popen[str]", lines: "queue.Queue[tuple[int, str]]") -> None:
    assert process.stdout
    for text in process.stdout:
        lines.put((rank, text))
    lines.put((rank, ""))
