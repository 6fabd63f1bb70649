"""Names of the text metrics, what each needs, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedexlora.data.score import Score, UncomputedError, missing, versions
from fedexlora.data.text_metrics.bleu import bleu, e2e_bleu
from fedexlora.data.text_metrics.coco import cider, meteor, rouge_l
from fedexlora.data.text_metrics.corpus import Corpus
from fedexlora.data.text_metrics.nist import nist
from fedexlora.errors import DataError

COCO = ("pycocoevalcap", "java")
PTB = "lower-case tokens of Stanford PTB 3.4.1 without punctuation"


@dataclass(frozen=True, slots=True)
class TextMetric:
    """A metric of a corpus.

    Attributes:
        function: the score of a corpus.
        requirements: the packages, and Java, that it needs.
        implementation: the program, and the settings that the value depends on.
    """

    function: Callable[[Corpus], float]
    requirements: tuple[str, ...]
    implementation: str


TEXT_METRICS: Mapping[str, TextMetric] = {
    "bleu": TextMetric(
        bleu, ("sacrebleu",), "sacrebleu case:mixed|eff:no|tok:13a|smooth:exp, 0 to 100"
    ),
    "e2e_bleu": TextMetric(
        e2e_bleu, ("sacrebleu",), "sacrebleu case:lc|eff:no|tok:13a|smooth:exp, 0 to 100"
    ),
    "nist": TextMetric(
        nist, ("sacrebleu",), "fedexlora, mteval-v13a's NIST-5, case:lc|tok:13a of sacrebleu"
    ),
    "meteor": TextMetric(meteor, COCO, f"METEOR 1.5 -l en -norm, {PTB}, 0 to 100"),
    "rouge_l": TextMetric(rouge_l, COCO, f"MS-COCO ROUGE-L, beta 1.2, {PTB}, 0 to 100"),
    "cider": TextMetric(cider, COCO, f"MS-COCO CIDEr-D, n 4, sigma 6, {PTB}, 0 to 10"),
}
E2E_METRICS = ("e2e_bleu", "nist", "meteor", "rouge_l", "cider")


def metric_faults(names: Iterable[str]) -> list[str]:
    """What keeps each of these metrics from being computed on this machine; empty if nothing.

    For a check before a run: nothing is computed and no heavy package is loaded.
    """
    faults = []
    for name in names:
        if name not in TEXT_METRICS:
            faults.append(f"{name!r} is no metric; expected one of {', '.join(TEXT_METRICS)}")
            continue
        faults += [f"{name}: {fault}" for fault in missing(TEXT_METRICS[name].requirements)]
    return faults


def text_scores(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[Score]:
    """The scores of predictions ``(n,)`` against each one's references, one for each name.

    A metric whose package or Java is missing, or whose program fails, is not computed and says why.

    Raises:
        DataError: a name is unknown, or the texts cannot be scored.
    """
    unknown = [name for name in names if name not in TEXT_METRICS]
    if unknown:
        raise DataError("unknown metric", metric_faults(unknown))
    corpus = Corpus(predictions, references)
    return [_score(name, corpus) for name in names]


def _score(name: str, corpus: Corpus) -> Score:
    metric = TEXT_METRICS[name]
    value: float | None = None
    reason = "; ".join(missing(metric.requirements)) or None
    if reason is None:
        try:
            value = metric.function(corpus)
        except UncomputedError as error:
            reason = str(error)
    if value is not None and not math.isfinite(value):
        value, reason = None, f"its value is {value}"
    return Score(name, value, reason, metric.implementation, versions(metric.requirements))
