"""Norms of frozen weights, and what a bf16 fold would lose, against dense float64."""

from __future__ import annotations

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.peft_bridge.base_norms import base_norms, bf16_loss
from fedexlora.peft_bridge.model import AdaptedModel
from tests.models import adapted
from tests.rounds.scripted import federation, run_round

CASES = ["llama-rslora", "gpt2-patterns", "embedding", "patches"]


def frozen(model: AdaptedModel, name: str) -> torch.Tensor:
    module = model.modules[name]
    return module.matrix(module.weight.detach()).double()


@pytest.mark.parametrize("case", CASES)
def test_the_norms_are_those_of_the_weights_whatever_was_folded_into_them(case):
    model = AdaptedModel(adapted(case))
    wanted = {name: float(frozen(model, name).norm()) for name in model.modules}
    parts, state = federation(model, "fedex")
    run_round(parts, state)
    found = base_norms(model)
    assert found.keys() == model.modules.keys()
    for name, norm in wanted.items():
        assert found[name] == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_bf16_fold_loses_what_rounding_the_sum_loses(case, dense):
    """All of these modules have up to 32 rows: the figure is of the whole matrix."""
    model = AdaptedModel(adapted(case))
    generator = torch.Generator().manual_seed(3)
    for name, spec in model.spec.modules.items():
        a = torch.randn(2, spec.d_in, generator=generator, dtype=torch.float64)
        b = 1e-3 * torch.randn(spec.d_out, 2, generator=generator, dtype=torch.float64)
        total = LowRank(b @ a if dense else Factors(a, b))
        weight, added = frozen(model, name).bfloat16().double(), spec.scaling * (b @ a)
        lost = (weight + added).bfloat16().double() - weight - added
        rows = slice(None, None, -(-spec.d_out // 32))
        wanted = float(lost[rows].norm() / added[rows].norm())
        found = bf16_loss(model, name, total)
        assert found == pytest.approx(wanted, rel=1e-12)
        assert 0.0 < found < 2.0


def test_nothing_is_lost_of_nothing():
    model = AdaptedModel(adapted("gpt2-patterns"))
    name, spec = next(iter(model.spec.modules.items()))
    assert bf16_loss(model, name, LowRank.zeros(spec.d_out, spec.d_in, torch.float64)) is None
