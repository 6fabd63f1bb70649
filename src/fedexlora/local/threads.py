"""Processor threads of PyTorch: how many there are, and what they do while they wait.

By default, OpenMP's threads spin while they wait for each other. Where other programs want the
processor too, those that wait keep it from the one that they wait for: on a busy machine of two
cores, steps of a small model were 8 times slower with two threads than with one. Threads that sleep
instead cost little on an idle machine; ``docs/runs.md`` has the measurements.
"""

from __future__ import annotations

import os
from typing import TypedDict

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def set_threads(count: int | None = None) -> None:
    """Choose the threads of this process and of those that it starts.

    To be called before PyTorch is imported, because OpenMP reads its environment once. What the
    environment says of waiting stays as it is.

    Args:
        count: how many; None for what ``OMP_NUM_THREADS`` says, or else one for each processor.
    """
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


class Threads(TypedDict):
    """The threads of a process."""

    torch_threads: int
    thread_waiting: dict[str, str]
    """What the environment says of waiting."""


def describe_threads() -> Threads:
    """The threads of this process as they are, for the record."""
    import torch

    waiting = {name: os.environ[name] for name in _WAITING if name in os.environ}
    return {"torch_threads": torch.get_num_threads(), "thread_waiting": waiting}
