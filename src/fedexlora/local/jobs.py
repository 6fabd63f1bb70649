"""The job that trains a recipe's clients: chosen here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedexlora.local.job import LocalJob
from fedexlora.local.trainer import Collator, TrainerJob


def local_job(training: Mapping[str, Any], collator: Collator, rounds: int) -> LocalJob:
    """The job of a recipe.

    Args:
        training: its ``[training]`` table.
        collator: rows to a padded batch.
        rounds: how many rounds the run has.
    """
    return TrainerJob(training, collator, rounds)
