"""The local orchestration server refuses what isn't its own."""

import os
import socket
from pathlib import Path

import pytest

from pairs.errors import PairmillError
from pipelines.prefect_server import _wait, orchestration
from tests.pipelines.small_web import small_web


def test_a_port_that_answers_already_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PairmillError, match=f"port {port}"), orchestration(tmp_path, port):
            raise AssertionError("it came up")
    assert not (tmp_path / "prefect.db").exists() and "PREFECT_API_URL" not in os.environ


def test_an_answer_after_our_process_has_ended_is_not_ours(tmp_path: Path) -> None:
    with small_web({"/api/health": b"true"}) as site, pytest.raises(PairmillError, match="PREFECT_API_URL"):
        _wait(site.url("/api"), lambda: 1, tmp_path / "server.log")
