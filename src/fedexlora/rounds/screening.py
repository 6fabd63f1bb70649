"""Bad updates: what a round's rule makes of the updates that arrived, before they are summed.

A client's update is its change of the global model in the round: by module
``s_i (B_i A_i - B_i0 A_i0)``, where ``(A_i0, B_i0)`` is what it trained from and ``s_i`` its
scaling, and for every head and bias the difference. All of it is one vector, of which only inner
products are taken; no matrix is multiplied out.

What no inner product shows is a gauge: ``(1e6 B, 1e-6 A)`` is the same change. In a mean of factors
it is not, and a client that uses it could stop the run at the certificate. Its strain shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedexlora.algebra import robust
from fedexlora.algebra.factors import Factors, sizes, squared_norm
from fedexlora.algebra.lowrank import stack
from fedexlora.algebra.robust import Reweighted
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate

Rule = Literal["clip", "multi_krum", "trimmed_mean", "geometric_median"]

_NEEDS: Mapping[str, tuple[Callable[[int], int], str]] = {
    "multi_krum": (robust.krum_needs, "2 f + 3"),
    "trimmed_mean": (robust.trimming_needs, "2 f + 1"),
}
"""Rules that presume a number ``f`` of bad updates, and how many updates they need then."""
MOST_STRAIN = 8.0
"""Of one client, see :func:`fedexlora.algebra.robust.strain`. Clients that start from one adapter
and train have about ``p_i``, or a little more where they draw apart. The error of a float32 model
is half a unit in the last place, 6e-8, times the strain (measured on RoBERTa, Llama and GPT-2
layers), so that twice the most still holds 1e-6."""
_SCORES = {
    "clip": "norm",
    "multi_krum": "distance score",
    "trimmed_mean": "distance from the geometric median",
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What becomes of each update, in the order in which they were given."""

    result: Reweighted
    norms: tuple[float, ...]
    """The length of each change of the global model."""
    reasons: tuple[str, ...]
    """Why an update does not count at all; empty if it does."""


@dataclass(frozen=True, slots=True)
class Screening:
    """The rule of a run."""

    rule: Rule
    clip_norm: float | None = None
    """For ``clip``: the longest change; the round's median if None."""
    bad_share: float | None = None
    """For rules that reject: the share of a round's updates that may be bad."""

    def bad(self, count: int) -> int:
        """``f``: how many of ``count`` updates may be bad, the share rounded up."""
        # 0.07 of 100 is a little more than 7 in floating point.
        return math.ceil(round((self.bad_share or 0.0) * count, 9))

    def shortfall(self, count: int) -> str:
        """Why the rule protects nothing with ``count`` updates; empty if it does."""
        if self.rule not in _NEEDS:
            return ""
        needs, formula = _NEEDS[self.rule]
        bad = self.bad(count)
        if count >= needs(bad):
            return ""
        return (
            f"{self.rule} needs {formula} = {needs(bad)} updates, f = {bad} of {count} "
            f"presumed bad (federation.bad_share = {self.bad_share:g}); found {count}"
        )

    def judge(self, gram: Tensor, weights: Sequence[float]) -> Judgement:
        """Apply the rule.

        Args:
            gram: inner products of the changes, ``(k, k)`` float64.
            weights: what each update would count without a rule.

        Raises:
            ValueError: if :meth:`shortfall` says so.
        """
        result = self._applied(gram, weights)
        counted = [s for s, w in zip(result.scores, result.weights, strict=True) if w > 0.0]
        reasons = tuple(
            "" if weight > 0.0 else self._reason(score, counted)
            for score, weight in zip(result.scores, result.weights, strict=True)
        )
        return Judgement(result, tuple(robust.norms(gram).tolist()), reasons)

    def relieved(self, judged: Judgement, strains: Sequence[float]) -> Judgement:
        """What is left of a judgement without the clients that strain the mean of factors.

        Args:
            judged: from :meth:`judge`.
            strains: from :func:`strains_of`, by what it lets count.
        """
        reasons = tuple(
            why or (strain_reason(strain) if strain > MOST_STRAIN else "")
            for why, strain in zip(judged.reasons, strains, strict=True)
        )
        more = [i for i, why in enumerate(reasons) if why and not judged.reasons[i]]
        return Judgement(judged.result.without(more), judged.norms, reasons)

    def _applied(self, gram: Tensor, weights: Sequence[float]) -> Reweighted:
        bad = self.bad(len(weights))
        match self.rule:
            case "clip":
                return robust.clip(gram, weights, self.clip_norm)
            case "multi_krum":
                return robust.multi_krum(gram, weights, bad)
            case "trimmed_mean":
                return robust.trimmed_mean(gram, weights, bad)
            case "geometric_median":
                return robust.geometric_median(gram, weights)

    def _reason(self, score: float, counted: Sequence[float]) -> str:
        most = f", the {len(counted)} kept have at most {max(counted):.3g}" if counted else ""
        return f"{self.rule}: {_SCORES[self.rule]} {score:.3g}{most}"


def strain_reason(strain: float) -> str:
    """Why an update does not count whose product is like the others', and whose factors are not."""
    return (
        f"its factors B and A are so unlike the others' in size that their mean exceeds the mean "
        f"update {strain:.3g} times; at most {MOST_STRAIN:g}"
    )


def strains_of(
    updates: Sequence[tuple[ClientUpdate, GlobalState]],
    judged: Judgement,
    before: GlobalState,
    spec: AdapterSpec,
    specs: Mapping[str, AdapterSpec],
) -> list[float]:
    """The largest strain of each update in any module, as the judgement weighs them.

    Args:
        updates: checked updates, each with what it was trained from.
        judged: what they count.
        before: the version of the round, which may count beside them.
        spec: the common adapter.
        specs: the adapters of the clients that have another one, by client.
    """
    stay, whole = judged.result.stay, sum(judged.result.weights) + judged.result.stay
    counted = [i for i, weight in enumerate(judged.result.weights) if weight > 0.0]
    weights = [judged.result.weights[i] / whole for i in counted]
    most = [0.0] * len(updates)
    for name in spec.modules if counted else ():
        sent = []
        for update, start in (updates[i] for i in counted):
            scaling = specs.get(update.client, spec).modules[name].scaling
            held = start.adapter_of(update.client)[name]
            sent.append(update.factors(name, held).to(torch.float64).scaled(scaling))
        stays = before.adapter[name].to(torch.float64).scaled(spec.modules[name].scaling)
        parts = [pair.scaled(w) for pair, w in zip(sent, weights, strict=True)]
        mean = math.sqrt(squared_norm(stack([*parts, stays.scaled(stay / whole)])))
        found = robust.strain(weights, [sizes(pair) for pair in sent], mean)
        for i, strain in zip(counted, found, strict=True):
            most[i] = max(most[i], strain)
    return most


def gram_of(
    updates: Sequence[tuple[ClientUpdate, GlobalState]],
    before: GlobalState,
    spec: AdapterSpec,
    specs: Mapping[str, AdapterSpec],
) -> Tensor:
    """Inner products of the changes that updates are, ``(k, k)`` float64.

    Args:
        updates: checked updates, each with what it was trained from.
        before: the version of the round, for the names of heads and biases.
        spec: the common adapter.
        specs: the adapters of the clients that have another one, by client.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in spec.modules:
        changes = [
            _change(update, start, name).scaled(
                specs.get(update.client, spec).modules[name].scaling
            )
            for update, start in updates
        ]
        total += robust.gram(changes)
    for name in before.dense:
        total += robust.flat_gram(
            [(update.tensors[f"dense/{name}"], start.dense[name]) for update, start in updates]
        )
    return total


def _change(update: ClientUpdate, start: GlobalState, module: str) -> Factors:
    """``B A - B0 A0`` as ``(B - B0) A + B0 (A - A0)``, float64: small terms, not large ones."""
    held = start.adapter_of(update.client)[module]
    sent, old = update.factors(module, held).to(torch.float64), held.to(torch.float64)
    return Factors(torch.cat([sent.A, sent.A - old.A]), torch.cat([sent.B - old.B, old.B], dim=1))
