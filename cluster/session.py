"""A Ray session: joined where `RAY_ADDRESS` names one, else started on this machine and ended with the block.

A local session binds to loopback as far as Ray allows, shows no dashboard, sends no usage statistics, and
asks every client for a token that is made here and lives only in this process's environment (Ray reads it when it is
first imported, so import Ray nowhere else). Only what was started here is shut down; other Ray sessions of the
machine are never touched. Starting costs 3 to 10 s.
"""

import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Iterator

TOKEN = secrets.token_hex(32)  # one for all sessions of this process: Ray reads it once
OBJECT_STORE_BYTES = 200 * 2**20  # only references and statistics travel through it


def _environment() -> dict[str, str]:
    local = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "0" if sys.stderr.isatty() else "1",
        "RAY_DATA_LOG_LEVEL": "ERROR",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if "RAY_ADDRESS" in os.environ or "RAY_AUTH_MODE" in os.environ:
        return local
    return local | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@contextlib.contextmanager
def ray_session(workers: int) -> Iterator[None]:
    """Inside the block Ray runs with at least `workers` CPUs to schedule on (a local session counts them, it reserves
    nothing). An initialised session is used as it is."""
    made = {key: value for key, value in _environment().items() if key not in os.environ}
    os.environ.update(made)
    try:
        import ray  # after the environment: its C++ part reads it when it loads

        if ray.is_initialized():
            yield
            return
        _start(workers)
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        for key in made:
            os.environ.pop(key, None)


def _start(workers: int) -> None:
    import ray

    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **quiet)
    else:
        ray.init(
            address="local",
            num_cpus=max(workers, 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
