"""A training as a process: `python -m training.run JOB.json`, alone, by `training.launch` or under torchrun.

The job is a `TrainConfig`, of which this is one rank, or a `BlipJob`, which has one process. Ranks come from torchrun's
variables (RANK, WORLD_SIZE, LOCAL_RANK); they meet at PAIRMILL_RENDEZVOUS, or where torchrun says. Rank 0 writes
metrics, checkpoints and the model, and a JSON line for each step to standard output.
"""

import copy
import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from pairs.errors import PairmillError
from pairs.store import Store
from training import export, frame
from training.columns import make_loader, start_model
from training.config import BlipJob, BlipResult, TrainConfig, TrainResult
from training.frame import say
from training.hardware import check_gpus
from training.parallel import place
from training.plan import Cost, Plan
from training.preflight import meet
from training.teach import Contrast

JOBS: TypeAdapter[TrainConfig | BlipJob] = TypeAdapter(TrainConfig | BlipJob)


def main(path: str) -> int:
    """Does this process's part; 0 when the work is done, 2 after a user's error, which is printed as a JSON line."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    job = JOBS.validate_json(Path(path).read_text())
    try:
        result = train_pair(job) if isinstance(job, BlipJob) else _train(job)(job, rank, ranks, _join(rank, ranks))
        if rank == 0:
            say({"done": result.model_dump(mode="json")})
        if ranks > 1:
            dist.barrier()
            dist.destroy_process_group()
        return 0
    except PairmillError as error:
        say({"error": {"expected": error.expected, "found": error.found, "remedy": error.remedy}})
        return 2


def _train(config: TrainConfig) -> Callable[[TrainConfig, int, int, torch.device], TrainResult]:
    if config.spec.objective != "blip":
        return train_rank
    from training.blip_run import train_blip_rank  # transformers: seconds

    return train_blip_rank


def train_pair(job: BlipJob) -> BlipResult:
    """Captioner and match filter."""
    from training.blip import train_blip  # transformers: seconds
    from training.blip_data import trusted_pairs

    torch.set_num_threads(1)  # the two train beside each other
    counts: Counter[str] = Counter()
    result = train_blip(trusted_pairs(job, counts), job.spec, Path(job.out_dir), say)
    del counts["read"]
    return result.model_copy(update={"left_out": dict(counts) | result.left_out})


def train_rank(config: TrainConfig, rank: int, ranks: int, device: torch.device) -> TrainResult:
    """Trains two towers, as one of `ranks`."""
    return frame.train(config, config.spec, rank, ranks, device, functools.partial(_towers, config))


def _towers(config: TrainConfig, store: Store, plan: Plan, rank: int, ranks: int, device: torch.device) -> frame.Work:
    spec, m = config.spec, config.spec.model
    model, columns = start_model(store, config, plan)
    beside: dict[str, torch.nn.Module] = {}
    if spec.ema:
        beside["average"] = copy.deepcopy(model).requires_grad_(False)
    for module in (model, *beside.values()):
        place(module, spec.parallel, ranks, device)
    return frame.Work(
        model=model,
        beside=beside,
        cost=Cost((m.vision.layers, m.vision.width), (m.text.layers, m.text.width)),
        teach=Contrast(spec.objective, rank),
        publish=functools.partial(export.save_trained, spec, plan.tokens.used),
        loader=make_loader(columns),
    )


def _join(rank: int, ranks: int) -> torch.device:
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    check_gpus(local + 1)
    if not cuda:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or max(1, (os.cpu_count() or 1) // ranks))
    if cuda:
        torch.cuda.set_device(local)
    if ranks > 1:
        url = os.environ.get("PAIRMILL_RENDEZVOUS", "env://")
        meet(rank, ranks, url, "cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
