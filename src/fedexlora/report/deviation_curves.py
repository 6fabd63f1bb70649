"""The deviation analysis of arXiv:2410.09432, Sec. 5 and App. H, out of what rounds recorded.

With M = s sum_i w_i B_i A_i, the ideal update of a round, and R = M - s B A, what FedIT's mean of
the factors lacks of it, the *deviation* is |R| / |M| in Frobenius norms. The paper plots a "scaled
Frobenius norm" whose scale it does not define; here stand the share |R| / |M| and |R| itself, s
included. Over several modules both norms are those of all their entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedexlora.report.lines import Curve
from fedexlora.report.run_records import Modules, Numbers, table
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.tables import Form


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure of the analysis: a value of every run by round."""

    name: str
    title: str
    description: str
    up: str
    form: Form
    read: Callable[[Cell], Curve]


def share(cell: Cell) -> Curve:
    """|R| / |M| over all modules, by round."""
    return _finite([record.deviation for record in cell.run.rounds])


def norm(cell: Cell) -> Curve:
    """|R| over all modules, by round."""
    return _finite(_norms(cell.run.modules.residual()))


def against_weights(cell: Cell) -> Curve:
    """The norm of the cumulative remainder over that of the weights, all modules, by round."""
    modules = cell.run.modules
    weights = np.sqrt(np.sum(modules.weights**2))
    return _finite(_norms(modules.figures["remainder_norm"]) / weights if weights else [])


def rank(cell: Cell) -> Curve:
    """The mean rank at which the cumulative remainder is held as factors, by round."""
    ranks = cell.run.modules.ranks
    held = np.isfinite(ranks)
    counts = held.sum(axis=1)
    sums = np.where(held, ranks, 0.0).sum(axis=1)
    return {i + 1.0: float(s / n) for i, (s, n) in enumerate(zip(sums, counts, strict=True)) if n}


def bf16_loss(cell: Cell) -> Curve:
    """The share of the cumulative remainder that a bf16 fold would lose, all modules, by round."""
    figures = cell.run.modules.figures
    kept, loss = figures["remainder_norm"], figures["bf16_loss"]
    known = np.isfinite(loss) & np.isfinite(kept)
    lost = np.sqrt(np.sum(np.where(known, loss * kept, 0.0) ** 2, axis=1))
    whole = np.sqrt(np.sum(np.where(known, kept, 0.0) ** 2, axis=1))
    return {i + 1.0: float(x / y) for i, (x, y) in enumerate(zip(lost, whole, strict=True)) if y}


PANELS = (
    Panel(
        "deviation-rounds",
        "FedIT's update against the ideal, by round",
        "The deviation |R| / |M| over all modules in Frobenius norm: R is what the mean of the "
        "factors lacks of the ideal update M of the round. Where the method is not FedIT, it is "
        "what FedIT would have lost in that round.",
        "% of the ideal update",
        "share",
        share,
    ),
    Panel(
        "deviation-norm",
        "The same without a scale",
        "The Frobenius norm |R| over all modules, with alpha over r included.",
        "|R|",
        "number",
        norm,
    ),
    Panel(
        "remainder-weights",
        "Size of the remainder",
        "The Frobenius norm of the cumulative remainder over that of the frozen weights, all "
        "adapted modules together.",
        "% of the weights",
        "share",
        against_weights,
    ),
    Panel(
        "remainder-rank",
        "Rank of the remainder",
        "The mean rank at which the cumulative remainder is held, over the modules where it is no "
        "dense matrix. It is an upper bound of its rank.",
        "rank",
        "number",
        rank,
    ),
    Panel(
        "bf16-fold",
        "What a bf16 fold would lose",
        "The share of the cumulative remainder that rounding the sum with a bfloat16 weight would "
        "take away, tried on up to 32 rows of every module. A run does not fold so.",
        "% of the remainder",
        "share",
        bf16_loss,
    ),
)


def pooled(modules: Modules, chosen: list[int]) -> Numbers:
    """|R| / |M| over some modules, by round: ``(rounds,)``; not a number where a record lacks it.

    Args:
        modules: of a run.
        chosen: their places.
    """
    lost = _norms(modules.residual()[:, chosen])
    whole = _norms(modules.figures["mean_product"][:, chosen])
    found: Numbers = np.divide(lost, whole, out=np.zeros_like(lost), where=whole != 0.0)
    return found


def by_module(modules: Modules, round_: int) -> Numbers:
    """|R| / |M| by layer and projection; not a number where there is no such module.

    Args:
        modules: of a run.
        round_: from 1.
    """
    grid = np.full((len(modules.layers), len(modules.projections)), np.nan)
    for value, (layer, projection) in zip(
        modules.figures["deviation"][round_ - 1], modules.places, strict=True
    ):
        grid[modules.layers.index(layer), modules.projections.index(projection)] = value
    return grid


def by_layer(modules: Modules) -> Numbers:
    """|R| / |M| over each layer's modules: ``(layers, rounds)``."""
    found = [
        pooled(modules, [i for i, (at, _) in enumerate(modules.places) if at == layer])
        for layer in modules.layers
    ]
    return np.array(found).reshape(len(found), len(modules.figures["deviation"]))


def by_projection(modules: Modules) -> Numbers:
    """|R| / |M| over each projection's modules: ``(projections, rounds)``."""
    found = [
        pooled(modules, [i for i, (_, at) in enumerate(modules.places) if at == projection])
        for projection in modules.projections
    ]
    return np.array(found).reshape(len(found), len(modules.figures["deviation"]))


def epochs(cell: Cell) -> float | None:
    """Local epochs of a round; one if the recipe says nothing, none if it counts steps."""
    training = table(cell.run.recipe, "training")
    steps = training.get("max_steps", -1)
    found = training.get("num_train_epochs", 1)
    if not isinstance(found, int | float) or (isinstance(steps, int) and steps > 0):
        return None
    return float(found)


def by_epochs(runs: RunSet) -> dict[str, dict[float, list[float]]]:
    """|R| / |M| of round 1 by method and local epochs, a value for every run."""
    found: dict[str, dict[float, list[float]]] = {}
    for cell in runs.cells:
        local = epochs(cell)
        if local is not None and cell.run.rounds:
            by = found.setdefault(cell.run.method, {})
            by.setdefault(local, []).append(cell.run.rounds[0].deviation)
    return {method: dict(sorted(by.items())) for method, by in found.items() if len(by) > 1}


def _norms(values: Numbers) -> Numbers:
    found: Numbers = np.sqrt(np.sum(values**2, axis=1))
    return found


def _finite(values: list[float] | Numbers) -> Curve:
    return {i + 1.0: float(value) for i, value in enumerate(values) if np.isfinite(value)}
