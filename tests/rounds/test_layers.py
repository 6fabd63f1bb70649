"""Every kind of layer and initialisation: applied exactly, and exported as PEFT loads it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.export import save_factors, save_global
from fedexlora.peft_bridge.model import REMAINDER, AdaptedModel
from tests.exactness.oracle import Oracle, errors, untouched_weights
from tests.models import LAYERS, adapted, base_of, live_update, logits, lora_layers
from tests.rounds.scripted import WEIGHTS, federation, run_round


def named(adapter) -> dict[str, Tensor]:
    factors = {f"A/{name}": pair.A for name, pair in adapter.items()}
    return factors | {f"B/{name}": pair.B for name, pair in adapter.items()}


def play(case: str, placement: str, rounds: int):
    """Some rounds of random updates, and the oracle that has seen them."""
    peft = adapted(case)
    untouched = untouched_weights(peft)
    model = AdaptedModel(peft, placement=placement)
    started, sent = {}, {}

    def keep(updates) -> None:
        for update in updates:
            started[update.client] = named(update.form.before.adapter)
            sent[update.client] = {n: update.file.read(n) for n in update.file.tensors}

    parts, state = federation(model, "fedex", keep=keep)
    oracle = Oracle(case, {client: {} for client in WEIGHTS}, WEIGHTS)
    oracle.update = oracle.delta("site-a", named(state.adapter))
    for _ in range(rounds):
        state, record = run_round(parts, state)
        assert record.certificate.held
        oracle.round(started, sent)
    return model, state, oracle, untouched


@pytest.mark.parametrize("placement", ["auto", "side"])
@pytest.mark.parametrize("case", LAYERS)
def test_every_layer_applies_the_ideal_and_exports_it(case, placement, tmp_path):
    model, state, oracle, untouched = play(case, placement, 2)
    for name, error, allowed in errors(model.peft_model, oracle, untouched):
        assert error <= allowed, name
        if placement == "side":
            assert model.placement(name) == "side"
            assert error <= 1e-6
    said = logits(model.peft_model)
    live = {n: x.get_base_layer().weight.double() for n, x in lora_layers(model.peft_model)}
    save_global(model, state, tmp_path)
    loaded = PeftModel.from_pretrained(base_of(case), tmp_path)
    for name, layer in lora_layers(loaded):
        original = layer.get_base_layer().weight.double()
        whole = original + layer.get_delta_weight("default").double()
        expected = untouched[name] + oracle.update[name]
        assert float((whole - expected).norm()) <= 3e-6 * float(oracle.update[name].norm()), name
        assert live[name].shape == whole.shape
    torch.testing.assert_close(logits(loaded), said, rtol=1e-4, atol=1e-4)
    assert (said - logits(base_of(case))).norm() > 0.1 * said.norm(), "the update must matter"


def test_an_initialisation_that_changes_the_base_is_undone_on_export():
    model = AdaptedModel(adapted("pissa"))
    original = base_of("pissa").state_dict()
    changed = [
        n for n, m in model.modules.items() if not torch.equal(m.weight, original[f"{n}.weight"])
    ]
    assert changed == list(model.modules)
    assert model.taken_out.keys() == model.modules.keys()


def test_updates_on_a_changed_base_are_not_stored_as_adapters(tmp_path):
    model = AdaptedModel(adapted("olora"))
    state = model.initial_state()
    with pytest.raises(BridgeError, match="that their initialisation changed") as caught:
        save_factors(model, state.adapter, state.dense, tmp_path)
    assert "--keep-updates" in caught.value.faults[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["embedding", "patches", "convolutions", "tied-head"])
def test_a_side_weight_is_dense_where_factors_are_not_smaller(case):
    model = AdaptedModel(adapted(case), placement="side")
    before = logits(model.peft_model)
    state = model.initial_state()
    generator = torch.Generator().manual_seed(1)
    dense = {
        name: LowRank(0.1 * torch.randn(*m.shape, generator=generator).double())
        for name, m in state.total.items()
    }
    model.apply(replace(state, total=dense))
    for name, module in model.modules.items():
        held = module.side(REMAINDER)
        # Rounded once, to the float32 of the side weight.
        assert torch.equal(held.dense().float(), dense[name].value.float())
        torch.testing.assert_close(live_update(model, name) / module.scaling, dense[name].value)
    beside = logits(model.peft_model)
    untouched = base_of(case)
    with torch.no_grad():
        for name, module in model.modules.items():
            change = module.stored_weight(module.scaling * dense[name].value).float()
            weight = dict(untouched.named_modules())[name].weight
            if case == "tied-head" and name.endswith("wte"):
                continue
            weight.add_(change)
    if case != "tied-head":
        torch.testing.assert_close(beside, logits(untouched), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(beside, before)


def trained(model: AdaptedModel) -> set[str]:
    return {n for n, p in model.peft_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", LAYERS)
def test_what_is_trained_stays_the_same_and_no_side_adapter_is_dropped_out(case):
    model = AdaptedModel(adapted(case, lora_dropout=0.4), placement="side")
    before = trained(model)
    parts, state = federation(model, "fedex")
    state, _ = run_round(parts, state)
    assert trained(model) == before
    for _, layer in lora_layers(model.peft_model):
        assert isinstance(layer.lora_dropout[REMAINDER], nn.Identity)
        assert layer.active_adapters == ["default", REMAINDER]


def test_a_remainder_of_zero_leaves_no_side_adapter_behind():
    model = AdaptedModel(adapted("embedding"), placement="side")
    start = model.initial_state()
    parts, state = federation(model, "fedex")
    run_round(parts, state)
    model.apply(start)
    for _, layer in lora_layers(model.peft_model):
        assert layer.active_adapters == ["default"]
        assert REMAINDER not in layer.r


@pytest.mark.parametrize("case", LAYERS)
def test_drawing_new_factors_leaves_the_model_as_it_is(case):
    model = AdaptedModel(adapted(case))
    with torch.no_grad():
        for parameter in model.peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    before = {name: x.clone() for name, x in model.peft_model.state_dict().items()}
    shapes = {name: (m.rank + 2, 0.7) for name, m in model.spec.modules.items()}
    wider = model.spec.reshaped(shapes)
    drawn, again, other = (model.fresh(wider, seed) for seed in (3, 3, 4))
    after = model.peft_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name, pair in drawn.items():
        assert pair.rank == shapes[name][0]
        assert torch.equal(pair.A, again[name].A)
        assert torch.equal(pair.B, again[name].B)
        assert pair.product().norm() == 0
        assert not (torch.equal(pair.A, other[name].A) and torch.equal(pair.B, other[name].B))
        assert model.modules[name].scaling == model.spec.modules[name].scaling
