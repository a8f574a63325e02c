"""Fixtures of every floor: an empty workspace on local disk, and an empty store in memory."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pairs.store import Store
from pairs.workspace import Workspace

settings.register_profile("pairmill", deadline=None, database=None, derandomize=True, max_examples=60)
settings.load_profile("pairmill")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "workspace", create=True)


@pytest.fixture
def memory_store() -> Iterator[Store]:
    """A store in memory of its own root; what it holds goes with the test."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    yield store
    store.delete("", recursive=True)
