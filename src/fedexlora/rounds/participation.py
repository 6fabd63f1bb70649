"""Who takes part in a round, and how much each one counts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedexlora.exchange.seeds import derive_seed

Weighting = Literal["examples", "uniform", "capped"]
Stale = Literal["refuse", "accept"]


@dataclass(frozen=True, slots=True)
class AccessList:
    """Which clients may take part in a run at all; everybody, by default."""

    allow: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def fault(self, client: str) -> str:
        """Why a client may not take part; empty if it may."""
        if client in self.exclude:
            return "federation.exclude names it"
        if self.allow is not None and client not in self.allow:
            return "federation.allow does not name it"
        return ""


@dataclass(frozen=True, slots=True)
class Participation:
    """The rules of a run; those of a federation in which all clients take part, by default."""

    clients_per_round: int | None = None
    fraction: float | None = None
    min_updates: int = 1
    deadline: float | None = None
    """Seconds; None for none."""
    weighting: Weighting = "examples"
    weight_cap: int | None = None
    stale: Stale = "refuse"
    """What becomes of an update that comes in a later round than it was trained in."""

    def sample(self, clients: Sequence[str], seed: int, round_: int) -> tuple[str, ...]:
        """The clients of one round: a function of seed and round alone, in the given order.

        Args:
            clients: all that are registered.
            seed: the federation's.
            round_: from 1.
        """
        count = self.clients_per_round or len(clients)
        if self.fraction is not None:
            # 0.07 of 100 is a little more than 7 in floating point.
            count = math.ceil(round(self.fraction * len(clients), 9))
        if count >= len(clients):
            return tuple(clients)
        generator = random.Random(derive_seed(seed, round_, "\0participants"))
        return tuple(clients[i] for i in sorted(generator.sample(range(len(clients)), count)))

    def weight(self, num_examples: int, staleness: int = 0) -> float:
        """What a client's update counts, before weights are divided by their sum.

        Args:
            num_examples: the client's training rows.
            staleness: rounds between the version that it was trained from and that of now. The
                weight falls with ``(1 + staleness) ** -0.5`` (FedAsync's polynomial rule,
                arXiv:1903.03934, Sec. 5.2, with a = 1/2).
        """
        most = self.weight_cap or num_examples
        weight = 1.0 if self.weighting == "uniform" else float(min(num_examples, most))
        return weight / math.sqrt(1 + staleness)


def late(seconds: float, deadline: float | None) -> str:
    """Why an update that took so long does not count in its round; empty if it does."""
    if deadline is None or seconds <= deadline:
        return ""
    return f"late: {seconds:.1f} s, the round's deadline is {deadline:g} s"
