"""Which version has the best headline score, and when a run has waited for a better one in vain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedexlora.exchange.comparison_records import less_is_better
from fedexlora.exchange.records import FinishRecord, RoundRecord

if TYPE_CHECKING:
    from fedexlora.rounds.recipe import Recipe


@dataclass(frozen=True, slots=True)
class BestVersion:
    """A version and its headline score."""

    version: int
    metric: str
    score: float


class Selection:
    """Follows the scores of versions, in their order; the first of equal ones is the best.

    Args:
        metric: the run's headline.
        lower: whether less of it is better.
        patience: versions without a better score after which a run ends; None for never.
    """

    def __init__(self, metric: str, *, lower: bool, patience: int | None) -> None:
        self._metric = metric
        self._sign = -1.0 if lower else 1.0
        self._patience = patience
        self._last = 0
        self.best: BestVersion | None = None

    @staticmethod
    def of(
        recipe: Recipe, initial: Mapping[str, float], records: Iterable[RoundRecord]
    ) -> Selection:
        """The selection of a run that stands where it does: a function of its record alone."""
        table = recipe.evaluation
        lower = less_is_better(recipe.headline if table.mean is None else table.mean[0])
        found = Selection(recipe.headline, lower=lower, patience=recipe.federation.patience)
        found.see(0, initial)
        for record in records:
            found.see_round(record)
        return found

    @property
    def kept(self) -> int | None:
        """The version that is the best so far; None before any is scored."""
        return None if self.best is None else self.best.version

    @property
    def exhausted(self) -> bool:
        """Whether the last version that was scored is as many after the best as are waited for."""
        if self._patience is None or self.best is None:
            return False
        return self._last - self.best.version >= self._patience

    def see(self, version: int, scores: Mapping[str, float]) -> None:
        """Take note of a version's scores; those without the headline say nothing."""
        score = scores.get(self._metric)
        if score is None:
            return
        self._last = version
        if self.best is None or self._sign * score > self._sign * self.best.score:
            self.best = BestVersion(version, self._metric, score)

    def see_round(self, record: RoundRecord) -> None:
        """The scores in a round's record: the clients' are of the version before."""
        if record.scores is not None:
            self.see(record.scores.version, record.scores.metrics)
        self.see(record.round, record.metrics)

    def see_finish(self, record: FinishRecord) -> None:
        """The clients' scores of the final version."""
        if record.scores is not None:
            self.see(record.version, record.scores.metrics)
