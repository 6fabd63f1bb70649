"""Rows of a client that it is not trained on, but scored: its own validation rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np

from fedexlora.errors import DataError
from fedexlora.exchange.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Holdout:
    """By client, which rows are trained on and which are held out; in the order of the source."""

    train: Mapping[str, Sequence[int]]
    held_out: Mapping[str, Sequence[int]]


def hold_out(shares: Mapping[str, Sequence[int]], share: float, seed: int) -> Holdout:
    """Hold out a share of every client's rows, drawn by seed and client, wherever it runs.

    Args:
        shares: by client, the rows that it has.
        share: of these, rounded; above 0 and up to a half.
        seed: the federation's.

    Raises:
        DataError: naming every client that has too few rows for it.
    """
    train, held, faults = {}, {}, []
    for client, rows in shares.items():
        count = round(share * len(rows))
        if not 1 <= count < len(rows):
            least = floor(0.5 / share) + 1
            faults.append(f"{client}: {len(rows)} row(s), expected at least {max(2, least)}")
            continue
        draw = np.random.default_rng(derive_seed(seed, 0, f"{client}\0holdout"))
        chosen = set(draw.choice(len(rows), size=count, replace=False).tolist())
        held[client] = [row for i, row in enumerate(rows) if i in chosen]
        train[client] = [row for i, row in enumerate(rows) if i not in chosen]
    if faults:
        raise DataError(
            f"evaluation.holdout = {share:g} leaves clients without rows to score or to train on",
            [*faults, "raise evaluation.holdout or partition.min_rows, or exclude them"],
        )
    return Holdout(train, held)
