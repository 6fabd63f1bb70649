from math import isnan, sqrt

import numpy as np
import pytest

from fedexlora.data import config, metrics

PREDICTED, EXPECTED = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1])  # tp 2, fp 1, fn 1, tn 1


def test_values_by_hand_for_two_classes():
    assert metrics.accuracy(PREDICTED, EXPECTED, 2) == pytest.approx(3 / 5)
    assert metrics.f1(PREDICTED, EXPECTED, 2) == pytest.approx(4 / 6)
    assert metrics.matthews(PREDICTED, EXPECTED, 2) == pytest.approx((2 - 1) / sqrt(3 * 3 * 2 * 2))


def test_f1_of_three_classes_is_their_mean():
    predicted, expected = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 0])
    assert metrics.f1(predicted, expected, 3) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_predicting_one_class_only_has_no_matthews_correlation():
    assert metrics.matthews(np.ones(5, int), EXPECTED, 2) == 0.0
    assert metrics.f1(np.zeros(5, int), EXPECTED, 2) == 0.0


def test_values_by_hand_for_numbers():
    predicted, expected = np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 6.0])
    assert metrics.mse(predicted, expected) == pytest.approx(6 / 3)
    assert metrics.spearman(predicted, expected) == pytest.approx(1 - 6 * 2 / (3 * 8))
    assert metrics.pearson(predicted, expected) == pytest.approx(7 / sqrt(42 / 9 * 14))


@pytest.mark.parametrize("metric", [metrics.pearson, metrics.spearman])
def test_a_constant_has_no_correlation(metric):
    assert metric(np.full(4, 2.5), np.arange(4.0)) == 0.0
    assert metric(np.arange(4.0), np.full(4, 2.5)) == 0.0
    assert metric(np.array([1.0]), np.array([2.0])) == 0.0


@pytest.mark.parametrize("metric", metrics.REGRESSION.values())
def test_a_model_that_diverged_is_not_hidden(metric):
    assert isnan(metric(np.array([np.nan, 1.0, 2.0]), np.arange(3.0)))


def test_every_metric_that_a_recipe_may_name_exists():
    assert {*metrics.CLASSIFICATION, "loss"} == set(config.ClassificationMetric.__args__)
    assert {*metrics.REGRESSION, "loss"} == set(config.RegressionMetric.__args__)
