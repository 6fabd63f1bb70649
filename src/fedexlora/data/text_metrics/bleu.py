"""BLEU by sacrebleu, for any number of references."""

from __future__ import annotations

from fedexlora.data.text_metrics.corpus import Corpus


def bleu(corpus: Corpus) -> float:
    """BLEU, 0 to 100, by sacrebleu's defaults: upper and lower case differ."""
    return _bleu(corpus, lowercase=False)


def e2e_bleu(corpus: Corpus) -> float:
    """BLEU, 0 to 100, as the E2E challenge's script: mteval-v13a, which ignores case."""
    return _bleu(corpus, lowercase=True)


def _bleu(corpus: Corpus, lowercase: bool) -> float:
    from sacrebleu.metrics import BLEU

    metric = BLEU(lowercase=lowercase)
    return float(metric.corpus_score(list(corpus.predictions), corpus.streams).score)
