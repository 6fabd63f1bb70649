"""A server without model and data: what nodes agree on takes their place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedexlora import __version__
from fedexlora.errors import InputError, RecipeError, RunError
from fedexlora.exchange.records import HolderRecord
from fedexlora.exchange.wire import pack, unpack
from fedexlora.flower import coordinator, server
from fedexlora.flower.agreement import Agreement
from fedexlora.flower.frames import PROTOCOL, Frame
from fedexlora.flower.node import recipe_for_nodes
from fedexlora.flower.session import Session
from fedexlora.peft_bridge.export import origin_of
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.peft_bridge.origin import Statement, decode_origin
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.holder import HolderMeasure
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.flower.test_transport import _quick, grid_of, session, start
from tests.models import CASES, adapted
from tests.rounds.conftest import files, recipe_document, records_without_times

__all__ = ["_quick"]
CLIENTS = ("site-north", "site-south", "site-west")


@pytest.fixture(scope="module")
def document(bert, data_folder) -> dict:
    found = recipe_document(bert, data_folder)
    found["task"]["labels"] = ["x", "y"]
    return found | {"evaluation": {"where": "clients", "holdout": 0.25}}


@pytest.fixture(scope="module")
def scored(document, tmp_path_factory) -> Path:
    """The same run in one process."""
    out = tmp_path_factory.mktemp("scored") / "run"
    run(parse_recipe(document, "test"), out)
    return out


@pytest.fixture(scope="module")
def loaded(document, tmp_path_factory) -> dict[int, Session]:
    homes = tmp_path_factory.mktemp("nodes")
    return {7 + i: session(name, document, homes) for i, name in enumerate(CLIENTS)}


@pytest.fixture
def modelless(monkeypatch) -> None:
    """The server's side loads no model."""

    def refuse(*_: object) -> None:
        raise AssertionError("the server loads a model")

    monkeypatch.setattr(server, "_with_model", refuse)


@pytest.mark.exactness
@pytest.mark.usefixtures("modelless")
def test_the_run_is_that_of_one_process_to_the_bit(document, loaded, scored, tmp_path):
    result = start(grid_of(loaded), document, tmp_path / "run")
    assert files(result.adapter) == files(scored / "adapter")
    assert files(tmp_path / "run" / "adapter-best") == files(scored / "adapter-best")
    assert records_without_times(tmp_path / "run") == records_without_times(scored)
    ours, theirs = (RunFolder(x).read_finish() for x in (tmp_path / "run", scored))
    assert ours.model_copy(update={"seconds": 0}) == theirs.model_copy(update={"seconds": 0})
    assert {s._held.version for s in loaded.values()} == {3}
    record = result.records[1]
    assert record.holders.version == 1
    assert record.holders.held
    assert record.holders.kept == pytest.approx(1.0, abs=1e-3)
    assert record.certificate.forward is None
    assert record.certificate.error < 1e-6


@pytest.mark.usefixtures("modelless")
def test_a_client_whose_live_model_is_not_the_version_is_left_out(
    document, loaded, tmp_path, monkeypatch
):
    """The first of round 1 measures an error that is larger than what is allowed."""
    measured, measure = [], HolderMeasure.__call__

    def off(*given: object) -> HolderRecord:
        measured.append(measure(*given))
        return measured[-1].model_copy(update={"bound": 0.5} if len(measured) == 1 else {})

    monkeypatch.setattr(HolderMeasure, "__call__", off)
    short = {**document, "federation": document["federation"] | {"rounds": 1}}
    result = start(grid_of(loaded), short, tmp_path / "run")
    (out,) = result.records[0].left_out
    assert out.client == "site-north"
    assert out.reasons[0].startswith("its live model is not the version's: error")
    assert [client.client for client in result.records[0].clients] == ["site-south", "site-west"]


@pytest.mark.usefixtures("modelless")
def test_a_run_goes_on_with_the_same_beginning_and_no_other(document, loaded, scored, tmp_path):
    fewer = document | {"federation": document["federation"] | {"rounds": 2}}
    start(grid_of(loaded), fewer, tmp_path / "run")
    start(grid_of(loaded), document, tmp_path / "run")
    assert records_without_times(tmp_path / "run") == records_without_times(scored)
    assert files(tmp_path / "run" / "adapter") == files(scored / "adapter")
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["packages"]["torch"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(header | {"spec": "0" * 64}))
    with pytest.raises(InputError, match=f"spec: {'0' * 64} there"):
        start(grid_of(loaded), document, tmp_path / "run")


@pytest.mark.exactness
@pytest.mark.usefixtures("modelless")
def test_the_adapter_and_the_scores_are_those_of_a_server_with_the_model(
    document, whole, data_folder, tmp_path
):
    """Nodes that score on rows of their own train on all others, as without scores of theirs."""
    data = {"source": str(data_folder), "validation": "validation"}
    nodes = {
        i: session(name, document, tmp_path, data=data | {"share": name})
        for i, name in enumerate(CLIENTS)
    }
    result = start(grid_of(nodes), document, tmp_path / "run")
    assert files(result.adapter) == files(whole / "adapter")
    header = json.loads((whole / "run.json").read_text())
    wanted = [header["initial_metrics"], *(r.metrics for r in RunFolder(whole).read_records(3))]
    found = result.scores()
    for version, scores in enumerate(wanted):
        assert found[version] == pytest.approx(scores, rel=1e-6)
    finish = result.finish
    assert finish.scores.rows == 3 * header["validation_rows"]


@pytest.mark.usefixtures("modelless")
def test_without_scores_the_adapter_is_that_of_a_server_with_the_model(
    document, whole, loaded, tmp_path
):
    result = start(grid_of(loaded), document | {"evaluation": {"where": "none"}}, tmp_path / "run")
    assert files(result.adapter) == files(whole / "adapter")
    assert result.scores() == {}
    assert result.records[-1].holders.clients == 3
    assert not (tmp_path / "run" / "adapter-best").exists()
    assert not (tmp_path / "run" / "finish.json").exists()


def odd(one: Session, **changes: object) -> object:
    """A node that states something else."""

    def answer(frame: Frame) -> Frame:
        found = one.answer(frame)
        if frame.header["kind"] != "hello":
            return found
        return Frame({**found.header, "origin": found.header["origin"] | changes})

    return answer


@pytest.mark.usefixtures("modelless")
@pytest.mark.parametrize("part", ["base", "spec", "heads"])
def test_a_node_that_begins_otherwise_is_named_by_digest(document, loaded, tmp_path, part):
    grid = grid_of(loaded)
    other = "1 entries in float32, 0123456789abcdef" if part == "base" else "0" * 64
    grid.nodes[8] = odd(loaded[8], **{part: other})
    with pytest.raises(RunError) as caught:
        start(grid, document, tmp_path / "run")
    wanted = loaded[7]._begun()[0]
    said = f"{part}: expected {getattr(wanted, part)}, found {other}"
    assert [said in fault for fault in caught.value.faults] == [True]
    assert "node 8: " in caught.value.faults[0]
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


@pytest.mark.usefixtures("modelless")
def test_the_others_go_on_without_a_node_that_begins_otherwise(document, loaded, tmp_path):
    grid = grid_of(loaded)
    grid.nodes[7] = odd(loaded[7], heads="0" * 64)
    few = document | {"federation": document["federation"] | {"rounds": 1}}
    with pytest.raises(RunError):
        start(grid, few, tmp_path / "none", nodes=3)
    result = start(grid, few, tmp_path / "run", nodes=2)
    assert {client.client for client in result.records[0].clients} <= set(CLIENTS[1:]) | {
        CLIENTS[0]
    }


HOSTILE = {
    "no dict": [],
    "no base": {"base": 3},
    "a base with colours": {"base": "\x1b[31m"},
    "a long base": {"base": "x" * 300},
    "no digest": {"spec": "zz"},
    "too large": {"size": 2**40},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_statement_is_none(kind):
    found = Statement(
        "7 entries in float32, 0123456789abcdef", "0" * 64, "1" * 64, "2" * 64, 5
    ).header()
    assert Statement.read(found).size == 5
    with pytest.raises(ValueError, match="expected") as caught:
        Statement.read(found | HOSTILE[kind] if isinstance(HOSTILE[kind], dict) else HOSTILE[kind])
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_what_a_node_sends_is_the_model_s_beginning(case):
    model = AdaptedModel(adapted(case))
    origin = origin_of(model)
    stated, message = origin.encode()
    name = model.peft_model.peft_config["default"].base_model_name_or_path
    found = decode_origin(message, stated, ("A", "B"), name)
    assert found.state().id == model.initial_state().id
    assert found.spec == model.spec
    assert found.layout == origin.layout
    for module, live in model.modules.items():
        for letter, parameter in live.parameters().items():
            pair = live.factors()
            matrix = pair.A if letter == "A" else pair.B
            stored = found.layout.stored_factor(module, letter, matrix)
            assert torch.equal(stored, parameter)


def spoilt(message: bytes, change) -> bytes:
    tensors, header = unpack(message)
    change(tensors, header)
    return pack(tensors, header)


def _first(header: dict) -> list:
    return next(iter(header["modules"].values()))


SPOILT = {
    "another value": lambda t, h: t[min(t)].add_(1.0),
    "a tensor gone": lambda t, h: t.pop(min(t)),
    "one more": lambda t, h: t.update({"x": torch.zeros(1)}),
    "not finite": lambda t, h: t[min(t)].fill_(float("nan")),
    "another shape": lambda t, h: t.update({min(t): torch.zeros(2, 2)}),
    "no layers": lambda t, h: h.update(modules={}),
    "a layer of text": lambda t, h: h["modules"].update({min(h["modules"]): "x"}),
    "a huge layer": lambda t, h: _first(h).__setitem__(0, 2**60),
    "a negative layer": lambda t, h: _first(h).__setitem__(1, -1),
    "a scaling of text": lambda t, h: _first(h).__setitem__(4, "1"),
    "another scaling": lambda t, h: _first(h).__setitem__(4, 7.5),
    "a kernel of zero": lambda t, h: _first(h).__setitem__(6, [0]),
    "a name with colours": lambda t, h: h["modules"].update({"\x1b[31m": _first(h)}),
    "other names of files": lambda t, h: h["names"].update({min(h["names"]): "x"}),
    "DoRA": lambda t, h: h["config"].update(use_dora=True),
    "PiSSA": lambda t, h: h["config"].update(init_lora_weights="pissa"),
    "a setting with colours": lambda t, h: h["config"].update(bias="\x1b[31m"),
    "no settings": lambda t, h: h.update(config=None),
    "no precision": lambda t, h: h.update(precision=3),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_beginning_that_is_not_what_was_stated_is_refused(kind):
    stated, message = origin_of(AdaptedModel(adapted("llama-rslora"))).encode()
    with pytest.raises(ValueError, match=".") as caught:
        decode_origin(spoilt(message, SPOILT[kind]), stated, ("A", "B"), "base")
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ValueError, match="."):
        decode_origin(message[:-3], stated, ("A", "B"), "base")


def test_a_node_that_comes_once_all_is_agreed_states_its_model_too(document, loaded):
    sent = recipe_for_nodes(parse_recipe(document, "test"), document["task"])
    said = {"kind": "hello", "protocol": PROTOCOL, "fedexlora": __version__, "recipe": sent}
    first = loaded[7].answer(Frame({**said, "base": None})).header
    late = loaded[8].answer(Frame({**said, "base": first["origin"]["base"]})).header
    assert "failure" not in late
    assert late["origin"] == first["origin"]


@pytest.mark.parametrize("name", ["fedmomentum", "flexlora", "florist"])
def test_methods_that_may_draw_factors_need_a_model_at_the_server(document, name):
    changed = {**document, "method": {"name": name}}
    with pytest.raises(RecipeError, match="may draw new factors for the model's layers"):
        coordinator.check_coordinator(parse_recipe(changed, "test"))


def test_what_needs_a_model_at_the_server_is_refused(document):
    changed = {
        **document,
        "lora": document["lora"] | {"init_lora_weights": "pissa"},
        "method": {"next_adapter": "reinit"},
        "clients": {"site-west": {"lora": {"r": 1}}},
        "task": {k: v for k, v in document["task"].items() if k != "labels"},
    }
    with pytest.raises(RecipeError) as caught:
        coordinator.check_coordinator(parse_recipe(changed, "test"))
    said = str(caught.value)
    for key in ("init_lora_weights", "next_adapter", 'clients."site-west".lora', "task.labels"):
        assert key in said
    assert "evaluation.where = 'server'" in said
    with pytest.raises(RecipeError, match=r"method.name: 'flora' may draw new factors"):
        coordinator.check_coordinator(
            parse_recipe({**document, "method": {"name": "flora"}}, "test")
        )


def test_most_nodes_decide_and_of_equally_many_the_first():
    one = Statement("a", "0" * 64, "1" * 64, "2" * 64, 5)
    other, drawn = replace(one, base="b"), replace(one, adapter="3" * 64)
    agreement = Agreement({"x": other, "y": one, "z": drawn, "w": drawn})
    assert list(agreement.settle()) == ["x"]
    assert agreement.settled == drawn
    assert agreement.senders() == ["w", "z"]
    assert Agreement({"x": other, "y": one}).settle() == {
        "y": "its model is not the one that most nodes have: base: expected b, found a"
    }
