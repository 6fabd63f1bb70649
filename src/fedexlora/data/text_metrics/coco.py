"""METEOR, ROUGE-L and CIDEr of the MS-COCO caption evaluation, which the E2E script uses too."""

from __future__ import annotations

from fedexlora.data.text_metrics import java
from fedexlora.data.text_metrics.corpus import Corpus


def meteor(corpus: Corpus) -> float:
    """METEOR 1.5, 0 to 100, of the whole corpus."""
    references, predictions = corpus.ptb
    texts = [row[0] for row in predictions.values()]
    return 100.0 * java.meteor(list(references.values()), texts)


def rouge_l(corpus: Corpus) -> float:
    """MS-COCO's ROUGE-L, 0 to 100: mean over rows of F with beta 1.2.

    A row's precision and recall are those of its best reference, each by itself.
    """
    from pycocoevalcap.rouge.rouge import Rouge

    return 100.0 * float(Rouge().compute_score(*corpus.ptb)[0])


def cider(corpus: Corpus) -> float:
    """CIDEr-D, 0 to 10: weights of words come from this corpus's references."""
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(*corpus.ptb)[0])
