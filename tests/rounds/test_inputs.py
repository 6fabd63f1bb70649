"""What is handed to a sum stays as it is, also where a cast would be no copy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec, TensorSpec
from fedexlora.exchange.state import GlobalState, state_tensors
from fedexlora.exchange.update import ClientUpdate
from fedexlora.methods import METHODS
from fedexlora.rounds.common_update import CommonForm, HeldUpdate
from fedexlora.rounds.reduction import Reducer, WeightedUpdate, step_in_memory
from fedexlora.rounds.survey import gram_of, strains_of

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}


def state_of(spec: AdapterSpec, version: int, form: str) -> GlobalState:
    """A version of one module, ``(7, 5)`` of rank 2, and a head, all in float64."""
    draw = torch.Generator().manual_seed(version)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    adapter = {"m": Factors(random(2, 5), random(7, 2))}
    total = random(7, 5) if form == "dense" else Factors(random(1, 5), random(7, 1))
    return GlobalState(
        version, f"{version:064x}", adapter, {"m": LowRank(total)}, {"head": random(3, 4)}
    )


@pytest.mark.parametrize("form", ["dense", "factors"])
@pytest.mark.parametrize("method", METHODS)
def test_sums_write_nothing_that_they_are_given(method, form):
    chosen = METHODS[method].default
    module = ModuleSpec(7, 5, 2, torch.float64, 1.5)
    heads = {"head": TensorSpec((3, 4), torch.float64)}
    spec = chosen.upload_spec(AdapterSpec({"m": module}, heads, chosen.factors), 3)
    now, then = state_of(spec, 2, form), state_of(spec, 1, form)
    draw = torch.Generator().manual_seed(9)
    updates = [
        ClientUpdate(
            client=client,
            round=3,
            version=now.id,
            num_examples=int(weight),
            loss=1.0,
            base="",
            tensors={
                name: torch.randn(s.shape, generator=draw, dtype=s.dtype)
                for name, s in spec.tensors().items()
            },
        )
        for client, weight in WEIGHTS.items()
    ]
    given = [x for u in updates for x in u.tensors.values()]
    given += [x for state in (now, then) for x in state_tensors(state).values()]
    before = [(x, x.clone(), x._version) for x in given]
    form = CommonForm(now, spec, {})
    common = [
        HeldUpdate.of(update, form, start)
        for update, start in zip(updates, (now, then, now), strict=True)
    ]
    weights = list(WEIGHTS.values())
    reducer = Reducer(form, chosen, lambda spec: now.adapter, stay=0.5)
    counted = [WeightedUpdate(u, w) for u, w in zip(common, weights, strict=True)]
    reducer.reduce(counted, step_in_memory(now, chosen))
    gram_of(common, now, spec)
    strains_of(common, weights, 0.5, now, spec)
    assert all(torch.equal(x, copy) and x._version == version for x, copy, version in before)


def test_a_late_head_counts_by_its_change_since_the_version_that_it_started_from():
    spec = AdapterSpec(
        {"m": ModuleSpec(7, 5, 2, torch.float64, 1.5)},
        {"head": TensorSpec((3, 4), torch.float64)},
        ("A", "B"),
    )
    now, then = state_of(spec, 2, "dense"), state_of(spec, 1, "dense")
    tensors = {name: torch.ones(s.shape, dtype=s.dtype) for name, s in spec.tensors().items()}
    update = ClientUpdate("a", 3, 1, 4, 1.0, "", tensors)
    form = CommonForm(now, spec, {})
    counted = [
        WeightedUpdate(HeldUpdate.of(update, form, then), 2.0),
        WeightedUpdate(HeldUpdate.of(replace(update, client="b"), form), 6.0),
    ]
    made = Reducer(form, METHODS["fedex"].default, lambda spec: now.adapter).reduce(
        counted, step_in_memory(now, METHODS["fedex"].default)
    )
    change = 1.0 - then.dense["head"]
    wanted = (2.0 * (now.dense["head"] + change) + 6.0) / 8.0
    torch.testing.assert_close(made.step.dense["head"], wanted, rtol=1e-14, atol=0.0)
