"""Starts a BLIP training as a process of its own, streams its lines, and leaves none behind.

A process of its own, because training takes all cores' threads and its memory must go with it. Calling it again after
a kill resumes after the last checkpoint; after the end it returns at once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pairs.errors import PairmillError
from pairs.fingerprint import fingerprint
from pairs.process import ROOT, child
from pairs.recipe import BlipSpec
from training.config import Pin

Line = dict[str, Any]
VERSION = 1  # of what a training makes of the same job: raise it with any change that reaches the weights


class BlipJob(BaseModel):
    """`store` is the workspace's root, `shards` the pair shards of the trusted sources, `out_dir` a local folder,
    `apart` uids that aren't trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    store: str
    shards: list[Pin]
    spec: BlipSpec
    out_dir: str
    apart: list[str] = []

    @property
    def fingerprint(self) -> str:
        """Over the shards' content and the settings; not over where they lie."""
        spec = self.spec.model_dump(exclude={"checkpoint_every"})
        shards = [pin.model_dump() for pin in self.shards]
        return fingerprint({"version": VERSION, "shards": shards, "apart": self.apart, "blip": spec})


class BlipResult(BaseModel):
    """Folders that transformers loads, and how many pairs were learned from or left out, by reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    captioner: str
    matcher: str
    pairs: int
    left_out: dict[str, int]


def train_blip_job(job: BlipJob, on_line: Callable[[Line], None] = lambda line: None) -> BlipResult:
    """Trains captioner and matcher in a process that dies with this one. `on_line` gets a dict per step; leaving by an
    exception ends the process. Raises PairmillError for what the user can mend; its log is `out_dir`/train.log."""
    out = Path(job.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    path.write_text(job.model_dump_json(indent=2))
    home = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": home, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "training.blip_run", str(path)]
    log_path = out / "train.log"
    with (
        log_path.open("ab") as log,
        child(command, environment=environment, stdout=subprocess.PIPE, stderr=log, patience_s=0) as process,
    ):
        assert process.stdout
        with process.stdout:
            for text in process.stdout:
                line = json.loads(text) if text.startswith(b"{") else {}  # libraries print too
                if "done" in line:
                    return BlipResult.model_validate(line["done"])
                if "error" in line:
                    raise PairmillError(**line["error"])
                if line:
                    on_line(line)
        process.wait()
    end = [text for text in log_path.read_text().splitlines() if text.strip()][-3:]
    raise PairmillError(
        expected="the BLIP training to finish",
        found=f"exit code {process.returncode}: {' / '.join(end) or 'no message'}",
        remedy=f"see {log_path}; the same command resumes after the last checkpoint",
    )
