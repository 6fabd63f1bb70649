"""Norms by random probes against the matrices themselves."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from scipy.stats import chi2

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.probes import CHANCE, PROBES, Probes, least_share


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("largest", [None, 0])
def test_the_image_of_a_sum_is_that_of_the_matrix(largest):
    pair, dense = Factors(drawn(3, 70), drawn(2100, 3, seed=1)), drawn(2100, 70, seed=2)
    probes = Probes.of((2100, 70), 5, largest=largest)
    image = probes.add(probes.zeros((2100, 70)), pair, 0.5)
    probes.add(image, dense.float(), -2.0)
    whole = 0.5 * pair.product() - 2.0 * dense.float().double()
    wanted = whole if probes.vectors is None else whole @ probes.vectors
    torch.testing.assert_close(image, wanted, rtol=1e-12, atol=1e-12)
    found = probes.norm(image)
    if probes.exact:
        assert found.value == found.bound == pytest.approx(float(whole.norm()))
    else:
        assert found.value == pytest.approx(float(whole.norm()), rel=0.3)
        assert float(whole.norm()) <= found.bound


@pytest.mark.parametrize("rank", [1, 2, 40])
def test_a_bound_holds_for_every_seed_and_the_estimate_is_unbiased(rank):
    matrix = Factors(drawn(rank, 60), drawn(50, rank, seed=1)).product()
    norm, squares = float(matrix.norm()), []
    for seed in range(2000):
        probes = Probes.of((50, 60), seed, largest=0)
        found = probes.norm(probes.add(probes.zeros((50, 60)), matrix))
        assert norm <= found.bound
        squares.append(found.value**2)
    mean = sum(squares) / len(squares)
    assert mean == pytest.approx(norm**2, rel=4 * sqrt(2 / PROBES / len(squares)))


def test_the_bound_is_on_the_safe_side_of_the_distribution_that_it_bounds():
    share = least_share(PROBES, CHANCE)
    assert chi2.cdf(PROBES * share, PROBES) <= CHANCE
    assert chi2.cdf(PROBES * 4 * share, PROBES) > CHANCE
