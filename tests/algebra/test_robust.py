"""Rules against bad updates, against the same rules on dense vectors in float64."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexlora.algebra import robust
from fedexlora.algebra.factors import Factors, Sizes, sizes

D_OUT, D_IN = 19, 31
RULES = {
    "clip": robust.clip,
    "multi_krum": lambda gram, weights: robust.multi_krum(gram, weights, 2),
    "trimmed_mean": lambda gram, weights: robust.trimmed_mean(gram, weights, 2),
    "geometric_median": robust.geometric_median,
}
WEIGHTS = [1.0, 2.0, 5.0, 1.0, 3.0, 2.0, 4.0, 1.0, 2.0]


def random_factors(count: int, seed: int = 0, d_out: int = D_OUT, d_in: int = D_IN):
    """Factors of ranks 1, 2, 3, 1, ...; their float32 entries are exact in float64."""
    generator = torch.Generator().manual_seed(seed)
    ranks = [1 + i % 3 for i in range(count)]
    return [
        Factors(
            torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
        )
        for r in ranks
    ]


def points(count: int, seed: int = 0, dimension: int = 40, spread: float = 1.0):
    """Points around one that is not the origin, ``(count, dimension)`` float64."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(dimension, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return centre + spread * noise


def result(dense, reweighted):
    """The point that weights stand for; what stays is at the origin."""
    weights = torch.tensor(reweighted.weights, dtype=torch.float64)
    return weights @ dense / (weights.sum() + reweighted.stay)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 7),
    d_out=st.integers(1, 25),
    d_in=st.integers(1, 25),
    seed=st.integers(0, 10_000),
)
def test_the_gram_matrix_is_that_of_the_dense_products(count, d_out, d_in, seed):
    factors = random_factors(count, seed, d_out, d_in)
    dense = torch.stack([(f.B.double() @ f.A.double()).flatten() for f in factors])
    expected = dense @ dense.T
    assert (robust.gram(factors) - expected).norm() <= 1e-12 * expected.norm()


def test_factors_of_rank_zero_have_no_length():
    found = robust.gram([Factors.empty(D_OUT, D_IN, torch.float32), *random_factors(2)])
    assert not found[0].any()
    assert found[1, 1] > 0


def test_flat_tensors_are_summed_in_blocks(monkeypatch):
    monkeypatch.setattr(robust, "_BLOCK", 7)
    generator = torch.Generator().manual_seed(1)
    ends, starts = (
        [torch.randn(5, 4, generator=generator) for _ in range(3)] for _ in ("ends", "starts")
    )
    dense = torch.stack(
        [(x.double() - y.double()).flatten() for x, y in zip(ends, starts, strict=True)]
    )
    found = robust.flat_gram(list(zip(ends, starts, strict=True)))
    torch.testing.assert_close(found, dense @ dense.T, rtol=1e-13, atol=0)


def test_the_same_product_in_another_gauge_is_the_same_update():
    factors = random_factors(6)
    generator = torch.Generator().manual_seed(2)
    turned = []
    for f in factors:
        q = torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64)
        q += 3 * torch.eye(f.rank, dtype=torch.float64)
        wide = f.to(torch.float64)
        turned.append(Factors(torch.linalg.solve(q, wide.A) / 1e3, 1e3 * wide.B @ q))
    plain, other = robust.gram(factors), robust.gram(turned)
    assert (plain - other).norm() <= 1e-11 * plain.norm()
    for rule in RULES.values():
        if rule is RULES["multi_krum"]:
            continue  # it needs more clients
        torch.testing.assert_close(
            rule(plain, WEIGHTS[:6]).weights, rule(other, WEIGHTS[:6]).weights, rtol=1e-6, atol=0
        )


def test_distances_do_not_fall_below_zero():
    one = points(1).repeat(3, 1) * 1e8
    gram = one @ one.T
    gram[0, 1] = gram[1, 0] = gram[0, 1] * (1 + 1e-15)
    assert float(robust.distances(gram).min()) == 0.0


def test_clipping_scales_changes_to_the_limit():
    dense = points(9)
    dense[4] *= 20
    lengths = dense.norm(dim=1)
    found = robust.clip(dense @ dense.T, WEIGHTS, 5.0)
    expected = sum(
        w / sum(WEIGHTS) * x * min(1.0, 5.0 / float(x.norm()))
        for w, x in zip(WEIGHTS, dense, strict=True)
    )
    torch.testing.assert_close(result(dense, found), expected, rtol=1e-12, atol=1e-12)
    assert sum(found.weights) + found.stay == pytest.approx(sum(WEIGHTS))
    assert found.scores == pytest.approx(lengths.tolist())


def test_the_median_norm_counts_every_client_alike_and_is_the_lower_of_two():
    dense = torch.diag(torch.tensor([1.0, 2.0, 3.0, 100.0], dtype=torch.float64))
    found = robust.clip(dense @ dense.T, [1.0, 1.0, 1.0, 1e9])
    assert found.kept == (1.0, 1.0, 2 / 3, 2 / 100)


@pytest.mark.parametrize(
    "rule",
    [
        lambda gram, weights: robust.clip(gram, weights, 1e6),
        lambda gram, weights: robust.multi_krum(gram, weights, 0),
        lambda gram, weights: robust.trimmed_mean(gram, weights, 0),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_weights_are_the_same_numbers_when_nothing_is_rejected(rule, count):
    dense = points(count)
    found = rule(dense @ dense.T, WEIGHTS[:count])
    assert found.weights == tuple(WEIGHTS[:count])
    assert found.kept == (1.0,) * count
    assert found.stay == 0.0


def test_multi_krum_is_that_of_the_paper():
    dense, bad = points(9), 2
    scores = []
    for i, x in enumerate(dense):
        others = sorted(float((x - y).square().sum()) for j, y in enumerate(dense) if j != i)
        scores.append(sum(others[: 9 - bad - 2]))
    kept = sorted(range(9), key=lambda i: scores[i])[: 9 - bad]
    found = robust.multi_krum(dense @ dense.T, WEIGHTS, bad)
    assert found.scores == pytest.approx(scores)
    assert found.weights == tuple(WEIGHTS[i] if i in kept else 0.0 for i in range(9))


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0] * 9])
def test_the_geometric_median_has_the_least_sum_of_distances(weights):
    dense = points(9)
    at = result(dense, robust.geometric_median(dense @ dense.T, weights))
    pulls = [w * (x - at) / (x - at).norm() for w, x in zip(weights, dense, strict=True)]
    assert float(sum(pulls).norm()) <= 1e-6 * sum(weights)  # the gradient


def test_the_geometric_median_on_a_line_is_the_median():
    dense = torch.tensor([[0.0], [1.0], [2.0], [50.0], [1e6]], dtype=torch.float64)
    at = result(dense, robust.geometric_median(dense @ dense.T, [1.0] * 5))
    assert float(at) == pytest.approx(2.0, abs=1e-3)


def test_the_trimmed_mean_leaves_out_who_is_furthest_from_the_geometric_median():
    dense = points(9)
    at = result(dense, robust.geometric_median(dense @ dense.T, [1.0] * 9))
    far = (dense - at).norm(dim=1)
    out = far.topk(2).indices.tolist()
    found = robust.trimmed_mean(dense @ dense.T, WEIGHTS, 2)
    assert found.weights == tuple(0.0 if i in out else WEIGHTS[i] for i in range(9))
    assert found.scores == pytest.approx(far.tolist(), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_clients_does_not_matter(rule):
    dense = points(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    plain = RULES[rule](dense @ dense.T, WEIGHTS)
    moved = RULES[rule](dense[order] @ dense[order].T, [WEIGHTS[i] for i in order])
    assert moved.weights == pytest.approx([plain.weights[i] for i in order], rel=1e-9)
    assert moved.stay == pytest.approx(plain.stay)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(sorted(RULES)),
    power=st.floats(-3, 30),
    place=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_one_client_of_any_size_moves_the_result_by_no_more_than_the_others_differ(
    rule, power, place, seed
):
    dense = points(9, seed, spread=0.1)
    others = [i for i in range(9) if i != place]
    reach = float(torch.cdist(dense[others], dense[others]).max())
    mean = dense[others].mean(dim=0)
    outlier = points(1, seed + 1)[0]
    dense[place] = 10**power * outlier
    at = result(dense, RULES[rule](dense @ dense.T, [1.0] * 9))
    moved = float((at - mean).norm())
    if rule == "clip":  # it bounds the length of a change, not how far it is from the others
        assert moved <= reach + 2 * float(dense[others].norm(dim=1).max()) / 9
    else:
        assert moved <= 2 * reach


def test_two_of_nine_that_agree_are_rejected():
    dense = points(9, spread=0.1)
    dense[2] = dense[6] = -4 * dense[2]
    for rule in ("multi_krum", "trimmed_mean"):
        found = RULES[rule](dense @ dense.T, WEIGHTS)
        assert [i for i, w in enumerate(found.weights) if w == 0.0] == [2, 6]


def test_identical_changes_have_themselves_as_their_median():
    dense = points(1).repeat(4, 1)
    found = robust.geometric_median(dense @ dense.T, [1.0, 2.0, 3.0, 4.0])
    assert found.weights == pytest.approx((0.1, 0.2, 0.3, 0.4))
    still = robust.geometric_median(torch.zeros(3, 3, dtype=torch.float64), [1.0] * 3)
    assert still.weights == pytest.approx((1 / 3,) * 3)


def test_too_few_clients_are_refused():
    gram = points(6) @ points(6).T
    with pytest.raises(ValueError, match="at least 7 clients for 2 bad ones, found 6"):
        robust.multi_krum(gram, WEIGHTS[:6], 2)
    with pytest.raises(ValueError, match="at least 7 clients for 3 bad ones, found 6"):
        robust.trimmed_mean(gram, WEIGHTS[:6], 3)
    needs = [robust.krum_needs(f) for f in range(5)]
    assert all(a < b for a, b in pairwise(needs))


@pytest.mark.parametrize("gauge", [1e-4, 1.0, 1e4])
def test_the_strain_bounds_what_a_clients_factors_add_to_the_mean_beside_the_mean_product(gauge):
    weights = [0.5, 0.3, 0.2]
    pairs = [x.to(torch.float64) for x in random_factors(3)]
    pairs[1] = Factors(pairs[1].A / gauge, pairs[1].B * gauge)
    mean = float(sum(w * x.product() for w, x in zip(weights, pairs, strict=True)).norm())
    known = [sizes(x) for x in pairs]
    for found, pair in zip(known, pairs, strict=True):
        assert found == pytest.approx(
            [
                float(torch.linalg.matrix_norm(matrix, kind))
                for kind in ("fro", 2)
                for matrix in (pair.A, pair.B)
            ]
        )
    found = robust.strain(weights, known, mean)
    usual = [sorted(column)[1] for column in zip(*known, strict=True)]
    a, b = torch.eye(3, D_IN).double(), torch.eye(D_OUT, 3).double()
    a, b = a * min(usual[2], usual[0] / 3**0.5), b * min(usual[3], usual[1] / 3**0.5)
    for strain, weight, pair in zip(found, weights, pairs, strict=True):
        rank = pair.rank
        up = float((pair.B @ a[:rank]).norm())
        down = float((b[:, :rank] @ pair.A).norm())
        assert strain >= weight * max(up, down) / mean * (1 - 1e-12)
    assert max(found[0], found[2]) < 3.0
    assert (found[1] > 8.0) == (gauge != 1.0)


def test_the_strain_does_not_grow_with_the_rank_of_clients_that_train_from_one_adapter():
    found = []
    for rank in (2, 200):
        generator = torch.Generator().manual_seed(rank)
        a = torch.randn(rank, 400, generator=generator)
        pairs = [Factors(a, torch.randn(300, rank, generator=generator)) for _ in range(3)]
        product = sum(x.product() for x in pairs) / 3
        found.append(max(robust.strain([1 / 3] * 3, [sizes(x) for x in pairs], product.norm())))
    assert max(found) < 1.5


def test_the_strain_of_nothing_is_none_and_beside_a_mean_of_zero_it_has_no_bound():
    nothing, something = Sizes(2.0, 0.0, 2.0, 0.0), Sizes(2.0, 1.0, 2.0, 1.0)
    assert robust.strain([0.5, 0.5], [nothing] * 2, 0.0) == (0.0, 0.0)
    assert robust.strain([0.5, 0.5], [something] * 2, 0.0) == (inf, inf)


def test_who_is_left_out_of_a_clipped_mean_takes_along_what_clipping_left_where_it_was():
    found = robust.clip(torch.diag(torch.tensor([1.0, 4.0, 100.0]).double()), [1.0, 2.0, 3.0])
    rest = found.without([2])
    assert rest.weights == (1.0, 2.0, 0.0)
    assert rest.stay == pytest.approx(0.0)
    assert rest.kept == (1.0, 1.0, 0.0)
