"""Run as a process: starts the orchestration server on the database in HOME, and prints as JSON what it remembers and
what the command line says to each of the cases (lists of arguments), which report to that server.

A process of its own, because Prefect reads its settings once, when it is first imported.
"""

import asyncio
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from pipelines.cli import main
from pipelines.prefect_server import orchestration


async def remembered() -> dict[str, Any]:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        flows = await client.read_flow_runs()
        tasks = await client.read_task_runs()
        artifacts = await client.read_artifacts()
        logs = await client.read_logs()
    return {
        "flows": [(run.name, run.state_name) for run in flows],
        "tasks": [(run.name.rsplit("-", 1)[0], run.state_name) for run in tasks],
        "artifacts": {artifact.key: (artifact.type, artifact.data) for artifact in artifacts},
        "logs": [line.message for line in logs],
    }


def said(arguments: list[str]) -> tuple[object, str, str]:
    """Exit code, standard output and standard error of the command line."""
    sys.argv = ["pairmill", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except Exception as error:
            code = repr(error)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    home, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with orchestration(home):
        known = asyncio.run(remembered())
        print(json.dumps(known | {"said": [said(case) for case in cases]}, default=str))
