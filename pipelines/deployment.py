"""A schedule served by Prefect: one flow run at a time, each looking for what is new.

A run that would start while another is still going is cancelled, not queued: the next tick sees the same web.
"""

import os
from pathlib import Path

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.flows import EntrypointType

from pipelines.flywheel import SERVER, flywheel


def serve_schedule(recipe: Path, workspace: str, name: str, cron: str) -> None:
    """Registers the deployment and runs what falls due, until interrupted. A flow run ends with this process."""
    os.environ[SERVER] = str(os.getpid())
    flywheel.serve(
        name=name,
        cron=cron,
        parameters={"recipe": str(recipe), "workspace": workspace, "new": True},
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        limit=1,
        paused=False,  # it isn't served to stand still, and what paused it may be an earlier server's end
        pause_on_shutdown=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
        print_starting_message=False,
    )
