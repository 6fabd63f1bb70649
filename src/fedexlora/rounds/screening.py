"""Bad updates: what a round's rule makes of the updates that came, before they are added up.

The rule sees the inner products of the changes that updates are (``rounds.survey``). What no inner
product shows is a gauge: ``(1e6 B, 1e-6 A)`` is the same change. In a mean of factors it is not,
and a client that uses it could stop the run at the certificate. Its strain shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedexlora.algebra import robust
from fedexlora.algebra.robust import Reweighted
from fedexlora.errors import NoUpdatesError
from fedexlora.rounds.admission import Intake
from fedexlora.rounds.common_update import CommonForm
from fedexlora.rounds.survey import gram_of, strains_of

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
            strains: from :func:`fedexlora.rounds.survey.strains_of`, by what it lets count.
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


def screen(rule: Screening, intake: Intake, form: CommonForm) -> None:
    """Have a round's rule weigh its updates; what it rejects is left out by name.

    Args:
        rule: the run's.
        intake: what came back; changed.
        form: of the updates.

    Raises:
        NoUpdatesError: if there are too few updates for the rule to protect anything.
    """
    given = intake.updates
    if not given:
        return
    if short := rule.shortfall(len(given)):
        raise NoUpdatesError(f"round {form.before.version + 1}: {short}", intake.reasons())
    judged = rule.judge(gram_of(given, form.before, form.spec), [x.weight for x in given])
    result = judged.result
    strains = strains_of(given, result.weights, result.stay, form.before, form.spec)
    judged = rule.relieved(judged, strains)
    intake.updates, intake.stay = [], judged.result.stay
    for i, update in enumerate(given):
        if judged.reasons[i]:
            record = update.record
            size, since = record.uploaded_bytes, record.since
            intake.leave_out(update.client, [judged.reasons[i]], since, size)
            continue
        said = {"weight": judged.result.weights[i], "counted": judged.result.kept[i]}
        record = update.record.model_copy(update={**said, "norm": judged.norms[i]})
        intake.updates.append(update.weighed(record))
    before = {x.client: x.weight for x in given}
    if any(x.weight != before[x.client] for x in intake.updates):
        # An update that counts little may be of any size: the running means of the moments must
        # not begin with it.
        intake.updates.sort(key=lambda x: -x.weight)


def strained(intake: Intake, form: CommonForm) -> dict[str, float]:
    """Clients for whose sake the mean of factors cancels beyond what float32 holds, and how."""
    weights = [x.weight for x in intake.updates]
    found = strains_of(intake.updates, weights, intake.stay, form.before, form.spec)
    named = {x.client: strain for x, strain in zip(intake.updates, found, strict=True)}
    return {client: strain for client, strain in named.items() if strain > MOST_STRAIN}
