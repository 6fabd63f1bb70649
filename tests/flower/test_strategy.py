"""The strategy in Flower's own loop, over clients in this process."""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from peft import PeftModel, get_peft_model_state_dict

from fedexlora.errors import BridgeError, RunError
from fedexlora.exchange.digest import tensors_digest
from fedexlora.exchange.state import GlobalState, state_tensors
from fedexlora.exchange.update import decode_update
from fedexlora.flower import FedExLoRA, initial_arrays, load_arrays, save_adapter, update_arrays
from fedexlora.flower.arrays import (
    GLOBAL,
    UPDATE,
    byte_record,
    pack_shared,
    read_bytes,
    unpack_shared,
)
from tests.flower.grid import WEIGHTS, DirectGrid, app, content, trainer
from tests.models import adapted, base_of, logits, lora_layers

BAD = 13
"""The node that misbehaves, where one does."""


@pytest.fixture
def said(caplog):
    """What Flower's log says, which does not propagate."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


@torch.no_grad()
def deltas(model, case, dtype):
    """By module, all that it adds to the untouched layer's output: PEFT's forward in float64."""
    untouched = dict(base_of(case, dtype).named_modules())
    found = {}
    for path, layer in lora_layers(model):
        unit = torch.eye(layer.in_features, dtype=torch.float64)
        now = copy.deepcopy(layer).double().eval()
        found[path] = now(unit) - untouched[path].double()(unit)
    return found


def heads(model):
    """Trained copies of heads, float64."""
    named = model.state_dict().items()
    return {name: t.double() for name, t in named if ".modules_to_save." in name}


def start(apps, model, rounds=1, **arguments):
    strategy = FedExLoRA(min_available_nodes=len(apps), **arguments)
    return strategy.start(DirectGrid(apps), initial_arrays(model), num_rounds=rounds)


def fingerprint(arrays):
    """Equal if and only if the bits of all tensors are; headers may have another order."""
    return tensors_digest(state_tensors(unpack_shared(arrays).state))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("llama-rslora", torch.float32),
        ("llama-rslora", torch.bfloat16),
        ("gpt2-patterns", torch.float32),
        ("roberta", torch.float32),
        ("pissa", torch.float32),
    ],
)
def test_three_rounds_give_the_mean_of_the_clients_models(case, dtype, tmp_path):
    """Held against float64 sums; some clients keep their model, one makes it anew each time."""
    trained = {}

    def note(msg, model):
        key = msg.content["config"]["server-round"], msg.metadata.dst_node_id
        trained[key] = deltas(model, case, dtype) | heads(model)

    make = partial(adapted, case, dtype)
    kept = [make(), make()]
    apps = {
        11: app(trainer(make, note)),
        12: app(trainer(lambda: kept[0], note)),
        13: app(trainer(lambda: kept[1], note)),
    }
    versions = []

    def evaluate(round_, arrays):
        versions.append(arrays)

    grid, server = DirectGrid(apps), make()
    result = FedExLoRA(min_available_nodes=3).start(
        grid, initial_arrays(server), num_rounds=3, evaluate_fn=evaluate
    )
    assert len(versions) == 4
    resident = make()
    for round_, arrays in enumerate(versions[1:], 1):
        load_arrays(resident, arrays)
        for path, found in (deltas(resident, case, dtype) | heads(resident)).items():
            ideal = sum(w / 8 * trained[round_, node][path] for node, w in WEIGHTS.items())
            assert (found - ideal).norm() <= 1e-6 * ideal.norm(), (round_, path)

    save_adapter(server, result.arrays, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_of(case, dtype), tmp_path / "adapter")
    expected = deltas(resident, case, dtype)
    for path, found in deltas(loaded, case, dtype).items():
        assert (found - expected[path]).norm() <= 1e-6 * expected[path].norm(), path
    if dtype == torch.float32:
        torch.testing.assert_close(logits(loaded), logits(resident), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(base_of(case)), logits(resident), atol=1e-2)


CASE = "llama-rslora"


def good():
    return app(trainer(partial(adapted, CASE)))


def forged(**changes):
    """An update that lies."""

    def train(msg):
        honest = trainer(partial(adapted, CASE))(msg)
        message = read_bytes(honest["arrays"], UPDATE)
        spec = unpack_shared(msg.content["arrays"]).spec
        update = decode_update(message, spec, 1, str(msg.metadata.dst_node_id))
        lie = {key: change(update) for key, change in changes.items()}
        arrays = byte_record(UPDATE, replace(update, **lie).encode())
        return RecordDict({**honest, "arrays": arrays})

    return train


def first(update, change):
    name = next(iter(update.tensors))
    return {**update.tensors, name: change(update.tensors[name])}


def without_first(update):
    return dict(list(update.tensors.items())[1:])


def raises(msg):
    raise RuntimeError("no disk left")


def plain(msg):
    """Flower's own FlowerTune client."""
    model = adapted(CASE)
    return content(ArrayRecord(get_peft_model_state_dict(model)), msg.metadata.dst_node_id)


def metrics_of(change):
    def train(msg):
        honest = trainer(partial(adapted, CASE))(msg)
        return change(honest)

    return train


def with_weight(value):
    metrics = MetricRecord({"train_loss": 1.0} | ({} if value is None else {"num-examples": value}))
    return metrics_of(lambda honest: RecordDict({**honest, "metrics": metrics}))


def damaged(msg):
    honest = trainer(partial(adapted, CASE))(msg)
    values = honest["arrays"][UPDATE].numpy().copy()
    values[-1] ^= 1
    return RecordDict({**honest, "arrays": ArrayRecord({UPDATE: Array(values)})})


def of_numbers(msg):
    honest = trainer(partial(adapted, CASE))(msg)
    arrays = ArrayRecord({UPDATE: Array(np.ones((2, 3), np.float32))})
    return RecordDict({**honest, "arrays": arrays})


NAN = {"tensors": lambda u: first(u, lambda t: t.clone().fill_(float("nan")))}
NARROW = {"tensors": lambda u: first(u, lambda t: t.bfloat16())}
FAULTS = {
    "an error": (raises, "no disk left"),
    "other modules": (
        trainer(partial(adapted, CASE, target_modules=["q_proj"])),
        "found no adapter",
    ),
    "another scaling": (trainer(partial(adapted, CASE, lora_alpha=3)), "scaling="),
    "another rank": (trainer(partial(adapted, CASE, r=5)), "rank=5"),
    "bf16 factors": (
        trainer(lambda: adapted(CASE).bfloat16()),
        "dtype=torch.bfloat16",
    ),
    "another base": (
        trainer(partial(adapted, CASE, torch.bfloat16)),
        "base model: expected",
    ),
    "Flower's own keys": (plain, "found 16: 'base_model.model.model.layers.0"),
    "what it was sent": (lambda msg: content(msg.content["arrays"], BAD), f"found 1: '{GLOBAL}'"),
    "an array of numbers": (of_numbers, "expected an array of bytes"),
    "damaged": (damaged, "checksum"),
    "NaN": (forged(**NAN), "values are not finite"),
    "a bf16 tensor": (forged(**NARROW), "found bfloat16"),
    "a missing tensor": (forged(tensors=without_first), "missing, expected float32"),
    "another version": (forged(version=lambda u: "7"), "found '7'"),
    "another round": (forged(round=lambda u: 7), "round: expected 1, found 7"),
    "another node": (forged(client=lambda u: "12"), "client: expected '13', found '12'"),
    "a NaN loss": (forged(loss=lambda u: float("nan")), "loss: expected a finite number"),
    "another weight": (with_weight(6), "expected the update's 5, found 6"),
    "no weight": (with_weight(None), "expected a positive number, found None"),
    "a NaN weight": (with_weight(float("nan")), "expected a positive number, found nan"),
    "a list of weights": (with_weight([5, 5]), "expected a positive number"),
    "no metrics": (
        metrics_of(lambda honest: RecordDict({"arrays": honest["arrays"]})),
        "expected one MetricRecord, found 0",
    ),
    "two arrays": (
        metrics_of(lambda honest: RecordDict({**honest, "more": honest["arrays"]})),
        "expected one ArrayRecord, found 2",
    ),
}


@pytest.fixture(scope="module")
def of_two():
    """What the two good nodes alone lead to."""
    return start({11: good(), 12: good()}, adapted(CASE)).arrays


@pytest.mark.parametrize("fault", FAULTS)
def test_a_node_that_sends_something_else_is_left_out_by_name(fault, of_two, said):
    train, reason = FAULTS[fault]
    result = start({11: good(), 12: good(), BAD: app(train)}, adapted(CASE))
    assert f"node {BAD} is left out" in said()
    assert reason in said(), said()
    assert fingerprint(result.arrays) == fingerprint(of_two)
    assert result.evaluate_metrics_clientapp[1] == {"eval_loss": 1.0}


def test_a_node_that_was_left_out_takes_part_again(said):
    trains = iter([raises, trainer(partial(adapted, CASE))])
    apps = {11: good(), 12: good(), BAD: app(lambda msg: next(trains)(msg))}
    result = start(apps, adapted(CASE), rounds=2)
    whole = start({11: good(), 12: good(), BAD: good()}, adapted(CASE))
    assert unpack_shared(result.arrays).state.version == 2
    assert "aggregate_train: 2 of 3 nodes count" in said()
    assert "aggregate_train: 3 of 3 nodes count" in said()
    assert result.train_metrics_clientapp[1] == whole.train_metrics_clientapp[1]


def test_a_round_without_updates_leaves_the_global_model_as_it_is(tmp_path):
    model = adapted(CASE)
    result = start({11: app(raises), 12: app(raises)}, model, rounds=2)
    assert not result.arrays
    with pytest.raises(RunError, match="hold no version of a global model"):
        save_adapter(model, result.arrays, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

    rounds = iter([raises, trainer(partial(adapted, CASE))])
    later = start({11: good(), 12: app(lambda msg: next(rounds)(msg))}, model, rounds=2)
    assert unpack_shared(later.arrays).state.version == 2


def test_a_round_that_failed_for_all_does_not_count_as_a_version():
    bad, fine = [[raises, trainer(partial(adapted, CASE))] for _ in range(2)]
    apps = {11: app(lambda msg: bad.pop(0)(msg)), 12: app(lambda msg: fine.pop(0)(msg))}
    result = start(apps, adapted(CASE), rounds=2)
    assert unpack_shared(result.arrays).state.version == 1


class Disorderly(DirectGrid):
    """Everything comes twice, last first."""

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        return [*replies, *replies][::-1]


def test_order_and_repetition_of_replies_change_no_bit(said):
    apps = {node: good() for node in WEIGHTS}
    expected = start(apps, adapted(CASE)).arrays
    strategy = FedExLoRA(min_available_nodes=3)
    found = strategy.start(Disorderly(apps), initial_arrays(adapted(CASE)), num_rounds=1).arrays
    assert "it replied twice; the first reply counts" in said()
    assert fingerprint(found) == fingerprint(expected)


class Forgetful(DirectGrid):
    """One node never answers."""

    def answers(self, message):
        return iter(()) if message.metadata.dst_node_id == BAD else super().answers(message)


def test_a_node_that_does_not_answer_is_named(of_two, said):
    grid = Forgetful({node: good() for node in WEIGHTS})
    strategy = FedExLoRA(min_available_nodes=3)
    found = strategy.start(grid, initial_arrays(adapted(CASE)), num_rounds=1).arrays
    assert "it did not answer" in said()
    assert fingerprint(found) == fingerprint(of_two)


def test_metrics_of_other_keys_are_left_out_and_the_update_is_not(said):
    def more(honest):
        metrics = MetricRecord(dict(honest["metrics"]) | {"perplexity": 3.0, "train_loss": 9.0})
        return RecordDict({**honest, "metrics": metrics})

    expected = start({node: good() for node in WEIGHTS}, adapted(CASE))
    result = start({11: good(), 12: good(), BAD: app(metrics_of(more))}, adapted(CASE))
    assert "metrics ['perplexity'] are not those of most" in said()
    assert result.train_metrics_clientapp[1] == {"train_loss": 1.0}
    assert fingerprint(result.arrays) == fingerprint(expected.arrays)


def test_weights_may_come_from_another_key():
    weights = {11: 0.5, 12: 1.5}

    def train(msg):
        honest = trainer(partial(adapted, CASE))(msg)
        weight = weights[msg.metadata.dst_node_id]
        return RecordDict({**honest, "metrics": MetricRecord({"trust": weight})})

    def evaluate(msg):
        weight = weights[msg.metadata.dst_node_id]
        return RecordDict({"metrics": MetricRecord({"trust": weight, "score": weight})})

    apps = {node: app(train, evaluate) for node in weights}
    result = start(apps, adapted(CASE), weighted_by_key="trust")
    assert result.evaluate_metrics_clientapp[1] == {"score": pytest.approx(1.25)}
    assert unpack_shared(result.arrays).state.version == 1


def test_the_arguments_are_those_of_fedavg():
    assert inspect.signature(FedExLoRA) == inspect.signature(FedAvg)


def test_the_summary_names_the_method_and_fedavgs_settings(said):
    FedExLoRA().summary()
    assert "FedEx-LoRA" in said()
    assert "Minimum available nodes: 2" in said()


def test_no_training_sends_nothing():
    result = start({11: good(), 12: good()}, adapted(CASE), fraction_train=0.0)
    assert not result.arrays
    assert not result.train_metrics_clientapp
    assert result.evaluate_metrics_clientapp[1] == {"eval_loss": 1.0}


def test_arrays_of_a_plain_adapter_are_refused_as_a_start():
    arrays = ArrayRecord(get_peft_model_state_dict(adapted(CASE)))
    with pytest.raises(RunError, match="hold no version of a global model"):
        FedExLoRA(min_available_nodes=1).start(DirectGrid({11: good()}), arrays)


def test_factors_too_narrow_for_a_mean_are_refused_as_a_start():
    with pytest.raises(BridgeError, match="autocast_adapter_dtype"):
        initial_arrays(adapted(CASE).bfloat16())


def test_what_travels_is_bit_exact():
    first = unpack_shared(initial_arrays(adapted(CASE)))
    second = unpack_shared(pack_shared(first))
    assert second.state.id == first.state.id
    assert (second.spec, second.base) == (first.spec, first.base)


def test_a_model_of_another_kind_is_left_unchanged():
    model = adapted("gpt2-patterns")
    before = logits(model)
    with pytest.raises(BridgeError, match="the global model is not one of this model"):
        load_arrays(model, initial_arrays(adapted(CASE)))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_an_update_needs_loaded_arrays_and_a_round():
    message = Message(RecordDict(), 11, "train")
    model = adapted(CASE)
    with pytest.raises(RunError, match="load_arrays was not called"):
        update_arrays(model, message, num_examples=1, loss=0.0)
    load_arrays(model, initial_arrays(adapted(CASE)))
    with pytest.raises(RunError, match="no 'server-round'"):
        update_arrays(model, message, num_examples=1, loss=0.0)


def test_an_adapter_is_not_written_over_something(tmp_path):
    (tmp_path / "mine").touch()
    model = adapted(CASE)
    with pytest.raises(BridgeError, match="already exists"):
        save_adapter(model, initial_arrays(model), tmp_path)


SMALL = "roberta.encoder.layer.0.attention.self.query"


def hardly_moved(msg, model):
    """Training that hardly moves one module: among all together it does not show."""
    with torch.no_grad():
        dict(model.base_model.model.named_modules())[SMALL].lora_B["default"].weight *= 1e-4


def off_by_more_than_is_allowed(kind):
    """A version of which one module, or one head, is off by 2e-3 of its update."""
    right = GlobalState.advance

    def wrong(state, steps):
        after = right(state, steps)
        adapter, dense = dict(after.adapter), dict(after.dense)
        if kind == "module":
            adapter[SMALL] = replace(adapter[SMALL], B=adapter[SMALL].B * 1.002)
        else:
            name = min(dense)
            dense[name] = dense[name] * 1.002
        return replace(after, adapter=adapter, dense=dense)

    return wrong


@pytest.mark.exactness
@pytest.mark.parametrize("kind", ["module", "head"])
def test_one_module_or_head_that_is_off_is_named_however_small_it_is(kind, monkeypatch):
    make = partial(adapted, "roberta")
    apps = {node: app(trainer(make, hardly_moved)) for node in WEIGHTS}
    start(apps, make())
    monkeypatch.setattr(GlobalState, "advance", off_by_more_than_is_allowed(kind))
    with pytest.raises(AggregationError, match="version 1 is not the ideal one") as caught:
        start(apps, make())
    name = SMALL if kind == "module" else "classifier"
    assert name in str(caught.value)
    assert str(caught.value).count(": off by ") == 1


def test_strange_texts_of_a_node_are_escaped_and_cut_in_the_log(said):
    nasty = "\x1b[2J\u202e\n[red]" * 5000

    def failing(msg):
        raise RuntimeError(nasty)

    def named(msg):
        honest = trainer(partial(adapted, CASE))(msg)
        values = {"train_loss": 1.0, "num-examples": 5, nasty: 1.0}
        return RecordDict({**honest, "metrics": MetricRecord(values)})

    def keyed(msg):
        return content(ArrayRecord({nasty: Array(np.zeros(3, np.uint8))}), 14)

    bad = {14: app(keyed), 15: app(named), 16: app(failing)}
    start({11: good(), 12: good(), **bad}, adapted(CASE))
    for node in bad:
        assert f"node {node} is left out" in said()
    assert len(said()) < 20_000
    assert all(c.isprintable() or c in "\n\t" for c in said())


def test_aggregating_without_a_round_is_an_error():
    with pytest.raises(AggregationError, match="configure_train was not called"):
        FedExLoRA().aggregate_train(1, [])


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)])
def test_flowers_private_clients_are_left_out_and_never_aggregated(mod, of_two, said):
    private = ClientApp(mods=[mod])
    train = trainer(partial(adapted, CASE))
    private.train()(lambda msg, context: Message(train(msg), reply_to=msg))
    private.evaluate()(lambda msg, context: Message(RecordDict(), reply_to=msg))
    result = start({11: good(), 12: good(), BAD: private}, adapted(CASE))
    assert f"node {BAD} is left out" in said()
    assert fingerprint(result.arrays) == fingerprint(of_two)


@pytest.mark.parametrize(
    "wrapper",
    [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping],
)
def test_flowers_private_strategies_never_give_a_noisy_model(wrapper):
    strategy = wrapper(FedExLoRA(), 1.0, 1.0, 2)
    grid = DirectGrid({11: good(), 12: good()})
    with pytest.raises((ValueError, RunError)):
        strategy.start(grid, initial_arrays(adapted(CASE)), num_rounds=2)
