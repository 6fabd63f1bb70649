"""NIST as mteval-v13a and the E2E challenge's script define it.

    NIST = p(L / L') * sum_{n=1..5}  sum_{matched n-grams} info(w_1..w_n) / (predicted n-grams)
    info(w_1..w_n) = log2( count(w_1..w_{n-1}) / count(w_1..w_n) ),  counted in all references
    p(x) = exp( ln(1/2) / ln(3/2)^2 * ln(min(x, 1))^2 )

``L`` is the number of predicted words, ``L'`` the sum over rows of the mean length of a reference.
A prediction's n-gram matches as often as the reference that has most of it holds it. Tokens are
mteval's (sacrebleu's ``13a``), in lower case. NLTK's ``nist_score`` has another length penalty and
other counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

from fedexlora.data.text_metrics.corpus import Corpus

Words: TypeAlias = Sequence[str]
Counts: TypeAlias = Counter[tuple[str, ...]]
ORDER = 5
PENALTY = math.log(0.5) / math.log(1.5) ** 2


def nist(corpus: Corpus) -> float:
    """NIST score, from 0; the largest possible value depends on the references."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer = Tokenizer13a()
    predictions = [tokenizer(text.lower()).split() for text in corpus.predictions]
    references = [[tokenizer(x.lower()).split() for x in row] for row in corpus.references]
    counts = _reference_counts(references)
    gain = sum(_gain(predictions, references, counts, n) for n in range(1, ORDER + 1))
    length = sum(map(len, predictions))
    expected = sum(sum(map(len, row)) / len(row) for row in references)
    return gain * _length_penalty(length, expected)


def _reference_counts(references: Sequence[Sequence[Words]]) -> Counts:
    """How often each n-gram, n from 0 to 5, is in all references; the empty one once a word."""
    counts: Counts = Counter()
    for words in (words for row in references for words in row):
        counts[()] += len(words)
        for n in range(1, ORDER + 1):
            counts.update(_ngrams(words, n))
    return counts


def _gain(
    predictions: Sequence[Words],
    references: Sequence[Sequence[Words]],
    counts: Counts,
    n: int,
) -> float:
    """Information of all matched n-grams, per predicted n-gram."""
    information, predicted = 0.0, 0
    for words, row in zip(predictions, references, strict=True):
        found = _ngrams(words, n)
        predicted += found.total()
        most: Counts = Counter()
        for reference in row:
            most |= _ngrams(reference, n)
        for ngram, matched in (found & most).items():
            information += matched * math.log2(counts[ngram[:-1]] / counts[ngram])
    return information / predicted if predicted else 0.0


def _ngrams(words: Words, n: int) -> Counts:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _length_penalty(length: int, expected: float) -> float:
    if length == 0:
        return 0.0
    return math.exp(PENALTY * math.log(min(length / expected, 1.0)) ** 2)
