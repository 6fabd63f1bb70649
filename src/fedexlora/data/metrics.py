"""What a model's predictions are worth, as plain numbers; scikit-learn and scipy compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Classes: TypeAlias = NDArray[np.int64]
Numbers: TypeAlias = NDArray[np.float64]


def accuracy(predicted: Classes, expected: Classes, labels: int) -> float:
    """Share of rows, 0 to 1, whose class is right.

    Args:
        predicted: the predicted classes, ``(n,)``, from 0 to ``labels - 1``.
        expected: the right classes, ``(n,)``.
        labels: how many classes the task has; has no effect here.
    """
    del labels
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(expected, predicted))


def f1(predicted: Classes, expected: Classes, labels: int) -> float:
    """F1 score, 0 to 1: of class 1 if there are two classes, else the mean over classes.

    The mean is over the classes that occur, as scikit-learn defines it; the score of a class that
    is never right is 0.

    Args:
        predicted: the predicted classes, ``(n,)``, from 0 to ``labels - 1``.
        expected: the right classes, ``(n,)``.
        labels: how many classes the task has.
    """
    from sklearn.metrics import f1_score

    average = "binary" if labels == 2 else "macro"
    return float(f1_score(expected, predicted, average=average, zero_division=0.0))


def matthews(predicted: Classes, expected: Classes, labels: int) -> float:
    """Matthews correlation, -1 to 1; 0 if all predictions, or all right classes, are the same.

    Args:
        predicted: the predicted classes, ``(n,)``, from 0 to ``labels - 1``.
        expected: the right classes, ``(n,)``.
        labels: how many classes the task has; has no effect here.
    """
    del labels
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(expected, predicted))


def pearson(predicted: Numbers, expected: Numbers) -> float:
    """Pearson correlation, -1 to 1, of two arrays ``(n,)``; 0 if one of them is constant.

    A constant says nothing about the other array. The formula is then 0 / 0, and NaN would make a
    model that predicts the mean look broken instead of useless.
    """
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, expected)


def spearman(predicted: Numbers, expected: Numbers) -> float:
    """Spearman rank correlation, -1 to 1, of two arrays ``(n,)``; 0 if one of them is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, expected)


def mse(predicted: Numbers, expected: Numbers) -> float:
    """Mean squared error of two arrays ``(n,)``; NaN if a prediction is NaN."""
    return float(np.mean(np.square(predicted - expected)))


CLASSIFICATION: Mapping[str, Callable[[Classes, Classes, int], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
REGRESSION: Mapping[str, Callable[[Numbers, Numbers], float]] = {
    "pearson": pearson,
    "spearman": spearman,
    "mse": mse,
}


def _correlation(
    function: Callable[[Numbers, Numbers], Any], predicted: Numbers, expected: Numbers
) -> float:
    if np.ptp(predicted) == 0.0 or np.ptp(expected) == 0.0:
        return 0.0
    return float(function(predicted, expected).statistic)
