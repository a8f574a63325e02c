"""A schedule served by Prefect: one flow run at a time, each looking for what is new.

A run that would start while another is still going is cancelled, not queued: the next tick sees the same web.
"""

import os
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.flows import EntrypointType
from prefect.states import Crashed

from pipelines.flywheel import SERVER, flywheel

GOING = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]


def serve_schedule(recipe: Path, workspace: str, name: str, cron: str) -> None:
    """Registers the deployment and runs what falls due, until interrupted. A flow run ends with this process. Call it
    when no other process writes to the workspace."""
    os.environ[SERVER] = str(os.getpid())
    if "://" not in workspace:  # elsewhere there is no lock that tells whether another machine writes
        _close_lost_runs(workspace)
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


def _close_lost_runs(workspace: str) -> None:
    """A run that was killed together with its deployment still counts as running, and would hold the one place for
    good."""
    going = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=GOING)))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=going):
            if run.parameters.get("workspace") == workspace:
                client.set_flow_run_state(run.id, Crashed(message="It was killed."), force=True)
