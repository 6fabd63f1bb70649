"""What tests over Flower share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flwr.supercore.task_identity import TaskIdentity

from tests.rounds.conftest import data_folder, whole

__all__ = ["data_folder", "whole"]


@pytest.fixture(scope="session", autouse=True)
def _identity() -> Iterator[None]:
    """Flower makes messages only in processes of its own; this is one of its private names."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield
