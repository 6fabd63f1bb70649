"""One round's updates, streamed: nothing of a client is kept once it is added."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedexlora.algebra.deviation import Deviation, deviation
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.moments import Moments
from fedexlora.exchange.shipment import Step
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.methods import Method


class RoundSums:
    """Sums over the clients of one round, weighted by their numbers of training examples.

    Two sums are kept for every module: the moments that the method aggregates, and the plain sum
    of products in float64 that its result is held against. Heads are summed in float64.

    Args:
        state: the version that the clients trained from.
    """

    def __init__(self, state: GlobalState) -> None:
        self._state = state
        self._moments: dict[str, Moments] = {}
        self._products = {
            name: LowRank.zeros(*factors.shape, torch.float64)
            for name, factors in state.adapter.items()
        }
        self._dense = {name: torch.zeros_like(t.double()) for name, t in state.dense.items()}
        self.weight = 0.0

    def add(self, update: ClientUpdate) -> None:
        """Add one checked update."""
        weight = float(update.num_examples)
        self.weight += weight
        for name, held in self._state.adapter.items():
            factors = update.factors(name, held)
            before = self._moments.get(name)
            self._moments[name] = (
                before.add(factors, weight) if before else Moments.of(factors, weight)
            )
            wide = factors.to(torch.float64)
            product = Factors(wide.A, weight * wide.B)
            self._products[name] = self._products[name].plus([product])
        for name, total in self._dense.items():
            total.add_(update.tensors[f"dense/{name}"].double(), alpha=weight)

    def aggregate(self, method: Method) -> Step:
        """The next version by ``method``, and the piece of remainder that leads to it."""
        aggregates = {name: method.aggregate(m) for name, m in self._moments.items()}
        pieces = {name: a.remainder for name, a in aggregates.items()}
        dense = {
            name: mean.to(self._state.dense[name].dtype)
            for name, mean in self.dense_ideal().items()
        }
        adapter = {name: a.adapter for name, a in aggregates.items()}
        return Step(self._state.advance(adapter, pieces, dense), pieces, method.trained)

    def ideal(self, module: str) -> Tensor:
        """The module's mean product in float64, unscaled, ``(d_out, d_in)``."""
        return self._products[module].dense(torch.float64) / self.weight

    def dense_ideal(self) -> Mapping[str, Tensor]:
        """The means of heads and biases, float64, by name."""
        return {name: total / self.weight for name, total in self._dense.items()}

    def deviations(self) -> Mapping[str, Deviation]:
        """What averaging the factors loses, by module."""
        return {name: deviation(moments) for name, moments in self._moments.items()}
