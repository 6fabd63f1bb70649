"""The claim: the model that is applied is W0 plus the float64 ideal.

The oracle shares no code with the product: float64 copies of the PEFT model, PEFT's own
``get_delta_weight`` and the naive weighted sum.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.spool import SpooledUpdate
from tests.exactness.oracle import half_ulp
from tests.models import CASES, adapted, lora_layers
from tests.rounds.scripted import WEIGHTS, federation, run_round

SHARES = {client: weight / sum(WEIGHTS.values()) for client, weight in WEIGHTS.items()}


class Oracle:
    """Averages the clients' models densely, in float64, in the orientation of each layer."""

    def __init__(self, case: str) -> None:
        self._peft = copy.deepcopy(adapted(case)).double()
        self.base = {n: x.base_layer.weight.data.clone() for n, x in lora_layers(self._peft)}
        self.frozen = dict(self.base)
        self.effective = dict(self.base)

    def delta(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's scaled update of every layer for these factors."""
        found = {}
        for name, layer in lora_layers(self._peft):
            layer.lora_A["default"].weight.data = factors[f"A/{name}"].double()
            layer.lora_B["default"].weight.data = factors[f"B/{name}"].double()
            found[name] = layer.get_delta_weight("default").detach().clone()
        return found

    def round(self, updates: dict[str, dict[str, Tensor]]) -> None:
        deltas = {client: self.delta(tensors) for client, tensors in updates.items()}
        keys = next(iter(updates.values()))
        mean = {k: sum(SHARES[c] * updates[c][k].double() for c in updates) for k in keys}
        averaged = self.delta(mean)
        for name in self.base:
            ideal = sum(SHARES[c] * deltas[c][name] for c in deltas)
            self.effective[name] = self.frozen[name] + ideal
            self.frozen[name] = self.effective[name] - averaged[name]


def half_ulp_norm(weight: Tensor) -> float:
    """What rounding every entry of a float32 weight once can cost."""
    return float(half_ulp(weight).norm())


def play(case: str, method: str, rounds: int):
    model = AdaptedModel(adapted(case))
    seen: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(rounds)]

    def keep(updates: Sequence[SpooledUpdate]) -> None:
        for update in updates:
            sent = {name: update.file.read(name).clone() for name in update.file.tensors}
            seen[update.form.before.version][update.client] = sent

    parts, state = federation(model, method, keep=keep)
    records = []
    for _ in range(rounds):
        state, record = run_round(parts, state)
        records.append(record)
    return model, state, records, seen


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_effective_weights_are_the_base_plus_the_float64_ideal(case, rounds):
    model, _, records, seen = play(case, "fedex", rounds)
    oracle = Oracle(case)
    for updates in seen:
        oracle.round(updates)
    for name, layer in lora_layers(model.peft_model):
        applied = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        update = oracle.effective[name] - oracle.base[name]
        error = float((applied - oracle.effective[name]).norm())
        assert error <= 1e-6 * float(update.norm()) + half_ulp_norm(layer.base_layer.weight), name
        # The weight's own rounding must not be what makes this pass.
        assert half_ulp_norm(layer.base_layer.weight) < 1e-6 * float(update.norm()), name
    assert all(record.certificate.held for record in records)
    assert all(m.error <= m.allowed for record in records for m in record.modules)


@pytest.mark.parametrize("case", CASES)
def test_fedit_is_off_by_the_deviation_that_the_record_states(case):
    model, _, records, seen = play(case, "fedit", 1)
    oracle = Oracle(case)
    oracle.round(seen[0])
    stated = {m.module: m for m in records[0].modules}
    squares = [0.0, 0.0]
    for name, layer in lora_layers(model.peft_model):
        assert torch.equal(layer.base_layer.weight.double(), oracle.base[name])
        ideal = oracle.effective[name] - oracle.base[name]
        error = (layer.get_delta_weight("default").double() - ideal).norm()
        relative = float(error / ideal.norm())
        assert relative > 0.1, "the clients must differ for this to prove anything"
        assert stated[name].deviation == pytest.approx(relative, rel=1e-4)
        assert stated[name].error == pytest.approx(relative, rel=1e-4)
        squares[0] += float(error**2)
        squares[1] += float(ideal.norm() ** 2)
    assert records[0].deviation == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert not records[0].certificate.held


@pytest.mark.parametrize("case", ["roberta", "roberta-biases"])
def test_heads_and_biases_are_the_weighted_mean(case):
    model, state, records, seen = play(case, "fedex", 2)
    names = [name for name in model.spec.tensors() if name.startswith("dense/")]
    assert names
    for name in names:
        mean = sum(SHARES[c] * seen[-1][c][name].double() for c in SHARES)
        torch.testing.assert_close(
            state.dense[name.removeprefix("dense/")].double(), mean, rtol=1e-6, atol=1e-7
        )
    assert records[-1].certificate.dense_error < 1e-6


def test_the_stored_base_is_what_the_total_is_added_to_however_often_it_is_applied():
    model, state, _, _ = play("gpt2-patterns", "fedex", 3)
    once = {name: m.weight.clone() for name, m in model.modules.items()}
    for _ in range(5):
        model.apply(state)
    for name, module in model.modules.items():
        assert torch.equal(module.weight, once[name])
