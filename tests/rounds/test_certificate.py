"""The two halves of the certificate, of modules that are measured whole and by random probes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from fedexlora.algebra import assignment, probes
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import ExactnessError, RecipeError
from fedexlora.exchange.tensors import TensorFile
from fedexlora.methods import METHODS
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds import certificate
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.models import adapted, live_update
from tests.rounds.scripted import federation, random_update, replies, run_round

CASES = ["llama-rslora", "gpt2-patterns", "embedding", "patches"]


@pytest.fixture(params=["whole", "probes"])
def measured(request, monkeypatch) -> str:
    """How modules are measured; all of a test's are small."""
    if request.param == "probes":
        monkeypatch.setattr(probes, "LARGEST", 0)
    return request.param


def play(case: str, method: str = "fedex", rounds: int = 2, **changes):
    model = AdaptedModel(adapted(case), **changes)
    parts, state = federation(model, method)
    for _ in range(rounds):
        state, record = run_round(parts, state)
    return model, state, record


@pytest.mark.exactness
@pytest.mark.parametrize("placement", ["auto", "side"])
@pytest.mark.parametrize("case", CASES)
def test_an_exact_round_is_held_and_its_bound_stays_below_what_is_allowed(
    case, placement, measured
):
    _, _, record = play(case, placement=placement)
    assert record.certificate.held
    for module in record.modules:
        assert 0.0 < module.error <= module.bound <= module.allowed
    if measured == "whole":
        assert max(m.bound for m in record.modules) < 3e-7


@pytest.mark.exactness
@pytest.mark.parametrize("case", CASES)
def test_probes_find_what_a_method_loses(case, monkeypatch):
    _, _, whole = play(case, "fedit", rounds=1)
    monkeypatch.setattr(probes, "LARGEST", 0)
    _, _, estimated = play(case, "fedit", rounds=1)
    for exact, found in zip(whole.modules, estimated.modules, strict=True):
        assert exact.error > 0.05
        assert found.error == pytest.approx(exact.error, rel=0.6)
        assert exact.error <= found.bound
        assert found.deviation == exact.deviation, "from Gram matrices, whatever the size"


def slightly_off(remainder):
    """A remainder of which 2e-5 is missing."""

    def rule(moments, adapter):
        found = remainder(moments, adapter)
        return LowRank(found.scaled(1 - 2e-5).value)

    return rule


@pytest.mark.exactness
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_the_ideal_one_stops_the_run(case, measured, monkeypatch):
    monkeypatch.setattr(assignment, "remainder", slightly_off(assignment.remainder))
    with pytest.raises(ExactnessError, match="round 1: the applied update is not the ideal one"):
        play(case)


@pytest.mark.exactness
@pytest.mark.parametrize("placement", ["auto", "side"])
@pytest.mark.parametrize("case", CASES)
def test_a_model_that_does_not_hold_its_version_stops_the_run(
    case, placement, measured, monkeypatch
):
    right = AdaptedModel.apply

    def wrong(self, state):
        right(self, state)
        if state.version == 2:
            name = min(self.modules)
            with torch.no_grad():
                self.modules[name].parameters()["B"].mul_(1 + 1e-4)

    monkeypatch.setattr(AdaptedModel, "apply", wrong)
    with pytest.raises(ExactnessError) as caught:
        play(case, placement=placement)
    assert len(caught.value.faults) >= 1
    assert "round 2" in str(caught.value)


@pytest.mark.exactness
def test_the_halves_are_those_of_the_naive_dense_matrices(measured):
    """The holder's half is a plain difference of dense matrices, in float64."""
    model, state, _ = play("llama-rslora", rounds=1)
    for name, module in model.modules.items():
        with torch.no_grad():
            module.parameters()["A"].add_(0.01)
        scaling, pair = module.scaling, state.adapter[name]
        wanted = scaling * (state.total[name].dense() + pair.B.double() @ pair.A.double())
        # The remainder is folded: what the weight changed by, and PEFT's own update.
        weight = module.layer.get_base_layer().weight
        live = (weight.double() - model.untouched[name].double()).detach()
        live += module.layer.get_delta_weight("default").double().detach()
        off = float((live - wanted).norm())
        found = certificate.held_error(model, name, state)
        assert found.value == pytest.approx(off, rel=1e-6 if measured == "whole" else 0.6)
        assert off <= found.bound * (1 + 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
@pytest.mark.parametrize("next_adapter", ["mean", "svd_aligned", "reinit"])
@pytest.mark.parametrize("case", CASES)
def test_a_reduction_on_a_gpu_is_held_against_the_processor_and_equals_its(case, next_adapter):
    method = METHODS["fedex"].rule_of({"next_adapter": next_adapter})
    states = {}
    for device in ("cpu", "cuda"):
        model = AdaptedModel(adapted(case))
        parts, state = federation(model, method, device=torch.device(device))
        for _ in range(2):
            state, record = run_round(parts, state)
            assert record.certificate.held
        states[device] = model
    for name in states["cpu"].modules:
        one, other = (live_update(states[device], name) for device in ("cpu", "cuda"))
        assert float((one - other).norm()) <= 1e-6 * float(one.norm())


def test_a_device_that_is_not_there_is_refused_by_its_key(document, tmp_path):
    document["federation"]["reduce_on"] = "cuda:7"
    with pytest.raises(RecipeError, match="federation.reduce_on: cuda:7 is asked for, there are"):
        run(parse_recipe(document, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    document["federation"]["reduce_on"] = "tpu"
    with pytest.raises(RecipeError, match="federation.reduce_on"):
        parse_recipe(document, "test")


@pytest.mark.exactness
def test_a_large_module_that_is_folded_is_held_by_its_whole_rounding(
    monkeypatch,
):
    """The rounding of a fold is what is allowed of it: it is measured whole, not estimated."""
    torch.manual_seed(0)
    layer = nn.Module()
    layer.proj = nn.Linear(1100, 1060, bias=False)
    nn.init.normal_(layer.proj.weight, std=0.02)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj"])
    model = AdaptedModel(get_peft_model(layer, config))
    (name,) = model.modules
    parts, state = federation(model, "fedex", small_updates(model))
    for _ in range(2):
        state, record = run_round(parts, state)
    assert model.placement(name) == "fold"
    assert not probes.Probes.of((1060, 1100), 0).exact
    assert record.certificate.held
    (module,) = record.modules
    assert 2e-6 < module.error < module.bound < module.allowed
    right = AdaptedModel.fold_error
    monkeypatch.setattr(AdaptedModel, "fold_error", lambda *x: 3 * right(*x))
    with pytest.raises(ExactnessError):
        run_round(parts, state)


def small_updates(model):
    """Updates that are small beside the weight, so that its rounding counts."""

    def script(round_, client, held):
        update = random_update(model, round_, client)
        tensors = {
            key: value * (0.002 if key.startswith("B") else 0.1)
            for key, value in update.tensors.items()
        }
        return replies(replace(update, tensors=tensors))

    return script


def test_a_file_is_read_to_the_processor_whatever_the_default_device_is(tmp_path):
    save_file({"x": torch.arange(6.0).reshape(2, 3)}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        found = TensorFile.open(tmp_path / "x.safetensors").read("x")
    assert torch.equal(found, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("case", CASES)
def test_norms_of_the_round_and_of_the_remainder_are_those_of_dense_sums(case, measured):
    """An estimate by 16 probes of matrices of low rank may well be a third off."""
    slack = {"whole": 1e-6, "probes": 0.6}[measured]
    model, state, record = play(case, rounds=1)
    weights = {"site-a": 1 / 8, "site-b": 2 / 8, "site-c": 5 / 8}
    updates = {client: random_update(model, 1, client).tensors for client in weights}
    for module in record.modules:
        name, scaling = module.module, model.spec.modules[module.module].scaling
        products = (
            w * updates[client][f"B/{name}"].double() @ updates[client][f"A/{name}"].double()
            for client, w in weights.items()
        )
        assert module.mean_product == pytest.approx(scaling * float(sum(products).norm()), rel=1e-6)
        total = scaling * float(state.total[name].dense().norm())
        assert module.remainder_norm == pytest.approx(total, rel=slack)
        assert module.remainder_norm == pytest.approx(
            module.deviation * module.mean_product, rel=slack
        )
