"""What can only be known of all updates of a round together, before any of them is added up.

A client's update is its change of the global model in the round: by module
``s (B_i A_i - B_i0 A_i0)``, where ``(A_i0, B_i0)`` is what it trained from, and for every head and
bias the difference. All of it is one vector, of which only inner products are taken; no matrix is
multiplied out. Modules are read one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedexlora.algebra import robust
from fedexlora.algebra.factors import Factors, sizes, squared_norm
from fedexlora.algebra.lowrank import stack
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.rounds.common_update import CommonUpdate


def gram_of(updates: Sequence[CommonUpdate], before: GlobalState, spec: AdapterSpec) -> Tensor:
    """Inner products of the changes that updates are, ``(K, K)`` float64.

    Args:
        updates: checked updates.
        before: the version of the round.
        spec: the common adapter.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name, module in spec.modules.items():
        changes = [_change(update, before, name).scaled(module.scaling) for update in updates]
        total += robust.gram(changes)
    for name in spec.dense:
        now = before.dense[name]
        total += robust.flat_gram([(update.head(name), now) for update in updates])
    return total


def strains_of(
    updates: Sequence[CommonUpdate],
    weights: Sequence[float],
    stay: float,
    before: GlobalState,
    spec: AdapterSpec,
) -> list[float]:
    """The largest strain of each update in any module (:func:`fedexlora.algebra.robust.strain`).

    Args:
        updates: checked updates.
        weights: what each counts; only ratios matter, also to ``stay``.
        stay: what the version of the round counts beside them.
        before: that version.
        spec: the common adapter.
    """
    counted = [i for i, weight in enumerate(weights) if weight > 0.0]
    whole = sum(weights) + stay
    shares = [weights[i] / whole for i in counted]
    most = [0.0] * len(updates)
    for name in spec.modules if counted else ():
        sent = [updates[i].factors(name) for i in counted]
        parts = [pair.to(torch.float64).scaled(p) for pair, p in zip(sent, shares, strict=True)]
        stays = before.adapter[name].to(torch.float64).scaled(stay / whole)
        mean = math.sqrt(squared_norm(stack([*parts, stays])))
        found = robust.strain(shares, [sizes(pair) for pair in sent], mean)
        for i, strain in zip(counted, found, strict=True):
            most[i] = max(most[i], strain)
    return most


def _change(update: CommonUpdate, before: GlobalState, module: str) -> Factors:
    """``B A - B0 A0`` as ``(B - B0) A + B0 (A - A0)``, float64: small terms, not large ones."""
    sent = update.factors(module).to(torch.float64)
    first = update.start(module) or before.adapter[module].padded(sent.rank)
    old = first.to(torch.float64)
    return Factors(torch.cat([sent.A, sent.A - old.A]), torch.cat([sent.B - old.B, old.B], dim=1))
