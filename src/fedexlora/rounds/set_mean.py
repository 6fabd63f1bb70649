"""The mean of several scores, as benchmarks of several sets report one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedexlora.data.answers.table import ANSWER_RULES
from fedexlora.data.config import CHOICE_ACCURACY, TaskConfig

if TYPE_CHECKING:
    from fedexlora.rounds.recipe import Recipe

MEAN = "mean"
_SHARES = frozenset({"accuracy", CHOICE_ACCURACY, *ANSWER_RULES})
"""Metrics that are the share of right answers, and so may be averaged with one another."""


def mean_faults(recipe: Recipe) -> list[str]:
    """What is wrong with ``evaluation.mean`` of a recipe whose sets are right."""
    named = recipe.evaluation.mean
    if named is None:
        return []
    known, faults = _known(recipe), []
    for name in dict.fromkeys(named):
        if named.count(name) > 1:
            faults.append(f"evaluation.mean: {name!r} stands there {named.count(name)} times")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            faults.append(f"evaluation.mean: the recipe has no score {name!r}; {hint}")
    metrics = dict.fromkeys(known[name] for name in named if name in known)
    if len(metrics) > 1 and not metrics.keys() <= _SHARES:
        faults.append(
            "evaluation.mean: expected one metric of several sets, or shares of right answers "
            f"alone ({', '.join(sorted(_SHARES))}); found {', '.join(metrics)}"
        )
    return faults


def mean_score(names: Sequence[str], scores: Mapping[str, float]) -> dict[str, float]:
    """The plain mean of the named scores, each counting the same whatever its rows.

    A mean of the others is another number: if some were not computed, there is none, and
    ``mean/uncomputed`` is their number.

    >>> mean_score(["a.gsm8k", "b.gsm8k"], {"a.gsm8k": 0.5, "b.gsm8k": 0.25})
    {'mean': 0.375}
    >>> mean_score(["a.meteor", "b.meteor"], {"a.meteor": 31.5, "b.meteor/uncomputed": 1.0})
    {'mean/uncomputed': 1.0}
    """
    missing = sum(name not in scores for name in names)
    if missing:
        return {f"{MEAN}/uncomputed": float(missing)}
    return {MEAN: sum(scores[name] for name in names) / len(names)}


def _known(recipe: Recipe) -> dict[str, str]:
    """By name of every score that the recipe has: its metric."""
    found = {name: name for name in _metrics(recipe.task)}
    for set_ in recipe.evaluation.sets:
        found |= {f"{set_}.{name}": name for name in _metrics(recipe.of_set(set_).task)}
    return found


def _metrics(task: TaskConfig) -> list[str]:
    generation = getattr(task, "generation", None)
    choices = [CHOICE_ACCURACY] if getattr(task, "choices", None) is not None else []
    own = [*task.metrics, *(generation.metrics if generation else ()), *choices]
    return list(dict.fromkeys(["loss", *own]))
