"""The flywheel: crawl → fetch → curate → gates → pretrain → evaluate → report, for N rounds; a BLIP's captioner and
match filter are fine-tuned after its pretraining.

Before round 1 a filter is trained on the trusted pairs. One Prefect task per stage, never per shard: Ray owns the
shards, and the Store (not Prefect's cache) owns resumption, so a task that has nothing to do says so and ends.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from pairs.process import watch_parent
from pipelines import stages, takedown
from pipelines.console import Console
from pipelines.run import Run, open_run

SERVER = "PAIRMILL_SERVER"  # the process that serves the schedule, for the flow runs that it starts

_stage = {"cache_policy": NO_CACHE, "persist_result": False}
crawl = task(stages.crawl, name="crawl", **_stage)
fetch = task(stages.fetch, name="fetch", **_stage)
first_filter = task(stages.first_filter, name="first-filter", **_stage)
curate = task(stages.curate, name="curate", **_stage)
gates = task(stages.gates, name="gates", **_stage)
pretrain = task(stages.pretrain, name="pretrain", **_stage)
finetune = task(stages.finetune, name="finetune", **_stage)
evaluate = task(stages.evaluate, name="evaluate", **_stage)
promote = task(stages.promote, name="promote", **_stage)


@task(name="report", **_stage)
def report(run: Run) -> dict[str, Any]:
    """Writes the report, and shows its funnel and its link beside the flow run."""
    summary = stages.report(run)
    create_link_artifact(key="report", link=f"file://{summary['report']}", link_text="report.html")
    for round_ in summary["rounds"]:
        create_table_artifact(key=f"funnel-round-{round_['round']}", table=round_["funnel"])
    return summary


@flow(name="flywheel", flow_run_name="{recipe}", validate_parameters=False, persist_result=False)
def flywheel(
    recipe: str,
    workspace: str | None = None,
    engine: str | None = None,
    until: str = "report",
    new: bool = False,
    recalibrate: bool = False,
    quiet: bool = False,
    advance: bool = False,
) -> dict[str, Any]:
    """Runs `recipe` up to the stage `until`; `new` looks for what the sources have that earlier runs didn't see, and
    scores it with the scorer in force unless `advance` asks for a new one."""
    if server := os.environ.get(SERVER):
        watch_parent(int(server))
    options = {"workspace": workspace, "engine": engine, "new": new, "recalibrate": recalibrate, "advance": advance}
    run = open_run(Path(recipe), console=Console(quiet), **options)  # type: ignore[arg-type]
    get_run_logger().info("workspace %s, %s", run.workspace.store.root, run.folder)
    stages.check(run.recipe)
    stages.warn(run)
    with run.workspace.lock(), contextlib.closing(run):
        for stage in (crawl, fetch):
            stage(run)
            takedown.finish(run.workspace)
            if until == stage.name:
                return stages.summary(run)
        scorer = first_filter(run)
        last = stages.rounds(run)
        for number in range(1, last + 1):
            picked = curate(run, number, scorer)
            if until == "curate":
                break
            gates(run, number, picked)
            trained = pretrain(run, number, picked)
            models = trained["models"] if run.recipe.finetune is None else finetune(run, number, picked, trained)
            evaluate(run, number, stages.served(run, number, trained, models))
            if until == "pretrain" and number == last:
                break
            scorer = promote(run, number, scorer, models)
        return report(run)
