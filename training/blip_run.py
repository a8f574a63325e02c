"""A BLIP training as a process: `python -m training.blip_run CONFIG.json` with a `BlipJob`; one JSON line per step.

It reads the trusted pairs from their shards; the held-out tenth and forgotten pairs are never trained on.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pairs.errors import PairmillError
from pairs.identity import held_out
from pairs.store import Store, table_metadata
from pairs.workspace import Workspace
from training.blip import train_blip
from training.blip_launch import BlipJob, BlipResult
from training.config import Pin


def main(path: str) -> int:
    """0 when the models are there, 2 after a user's error (told as a JSON line)."""
    job = BlipJob.model_validate_json(Path(path).read_text())
    torch.set_num_threads(1)  # captioner and matcher train beside each other
    counts: Counter[str] = Counter()
    try:
        models = train_blip(trusted_pairs(job, counts), job.spec, Path(job.out_dir), _say)
    except PairmillError as error:
        _say({"error": {"expected": error.expected, "found": error.found, "remedy": error.remedy}})
        return 2
    left_out = dict(counts - Counter(read=counts["read"])) | models.left_out
    result = BlipResult(
        captioner=str(models.captioner), matcher=str(models.matcher), pairs=models.pairs, left_out=left_out
    )
    _say({"done": result.model_dump()})
    return 0


def trusted_pairs(job: BlipJob, counts: Counter[str]) -> Iterator[tuple[bytes, str]]:
    """(encoded image, first text) in order of uid; `counts` gets what is left out: forgotten, held_out, canary."""
    store, apart = Store(job.store), set(job.apart)
    found: list[tuple[str, Pin, int, int, str]] = []
    for pin in job.shards:
        table = store.read_table(pin.ref.table)
        if table_metadata(table).get("tar_sha256") != pin.tar_sha256:
            raise PairmillError(
                expected=f"{pin.ref.table} to describe a tar of sha256 {pin.tar_sha256}",
                found=str(table_metadata(table).get("tar_sha256")),
                remedy="run the same command again: the shards were rewritten since this training was planned",
            )
        columns = (table[name].to_pylist() for name in ("uid", "image_offset", "image_size", "text"))
        for alive, uid, offset, size, text in zip(Workspace(store).alive(table), *columns, strict=True):
            reason = "forgotten" if not alive else "held_out" if held_out(uid) else "canary" if uid in apart else "read"
            counts[reason] += 1
            if reason == "read":
                found.append((uid, pin, offset, size, text or ""))
    for _, pin, offset, size, text in sorted(found, key=lambda pair: pair[0]):
        yield store.read(pin.ref.tar, offset, size), text


def _say(line: dict[str, Any]) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")  # in one piece: two processes write into the same pipe


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
