"""What leaves a node: codes, numbers and agreed names, whatever a server asks."""

from __future__ import annotations

import io
import json
import logging
import random
import string
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedexlora import __version__
from fedexlora.errors import DataError, NodeError
from fedexlora.exchange.delivery import deliver
from fedexlora.exchange.history import History
from fedexlora.exchange.node_faults import NodeFault
from fedexlora.exchange.wire import unpack
from fedexlora.flower import answer_file, apps, permission, session, worker
from fedexlora.flower.announcement import announcing
from fedexlora.flower.fault_frames import LogFormatter
from fedexlora.flower.frames import PROTOCOL, Frame, from_records, to_records
from fedexlora.flower.worker import Desk, ask_worker
from fedexlora.local.clients import LocalClients

CANARIES = random.Random(16)


def word() -> str:
    return "".join(CANARIES.choices(string.ascii_letters, k=16))


@dataclass(frozen=True)
class Ward:
    """A node whose every name, label and cell is a word that must not leave it."""

    config: Path
    text: str
    label: str
    secret: str
    """A column that no recipe may use."""
    gone: str
    """A column that a recipe may use, and that the rows do not have."""
    labels: tuple[str, str]
    cells: tuple[str, ...]
    base: str

    @property
    def words(self) -> list[str]:
        columns = (self.text, self.label, self.secret, self.gone)
        return [*columns, *self.labels, *self.cells, *self.config.parts[-2:-1]]

    def recipe(self) -> dict[str, Any]:
        """One that the node takes."""
        return {
            "model": {"source": "agreed"},
            "task": {"kind": "classification", "text": self.text, "label": self.label}
            | {"labels": list(self.labels)},
            "partition": {"kind": "iid", "clients": 2},
            "lora": {"r": 2, "target_modules": ["query"], "modules_to_save": ["pooler"]},
            "training": {"max_steps": 1, "use_cpu": True},
            "method": {"name": "fedex"},
            "federation": {"seed": 1},
            "clients": {},
        }


@pytest.fixture(scope="module")
def ward(bert, tmp_path_factory) -> Ward:
    folder = tmp_path_factory.mktemp("node") / word()
    (folder / "home").mkdir(parents=True)
    text, label, secret, gone = (word() for _ in range(4))
    labels, cells = (word(), word()), tuple(word() for _ in range(12))
    rows = [
        {text: cells[i], label: labels[i % 2], secret: cells[6 + i], "number": i} for i in range(6)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = folder / "node.toml"
    config.write_text(
        f"""
        client = "north"
        home = "{folder}/home"
        [data]
        source = "{folder}"
        [task]
        kinds = ["classification", "regression", "causal-lm"]
        columns = ["{text}", "{label}", "{gone}"]
        labels = ["{labels[0]}", "{labels[1]}"]
        [models]
        agreed = "{bert}"
        broken = "{folder}"
        """
    )
    made = Ward(config, text, label, secret, gone, labels, cells, "")
    opened = session.Session(worker.load_node(config), folder / "held")
    with pytest.raises(NodeError, match="base model is another one"):
        opened._ready({"recipe": made.recipe(), "base": ""})
    base = opened._trainer.model.base_fingerprint
    return Ward(config, text, label, secret, gone, labels, cells, base)


@pytest.fixture(scope="module")
def one_desk(ward) -> Desk:
    return Desk(ward.config)


@pytest.fixture
def desk(one_desk, monkeypatch) -> Desk:
    """The worker of the node in this process, in place of the one on its socket."""
    monkeypatch.setattr(worker, "ask_worker", lambda path, frame: one_desk.answer(frame))
    return one_desk


def request(recipe: object, base: object = "", **header: object) -> Frame:
    said = {"kind": "hello", "protocol": PROTOCOL, "fedexlora": __version__, "base": base}
    said["run"] = "a run"
    return Frame({**said, "recipe": recipe, **header})


def answered(content: RecordDict, node_config: dict, recipe: object = None) -> Message:
    """The reply of the node's app."""
    asked = Message(content, 7, "query", ttl=60.0)
    asked.metadata.__dict__["_message_id"] = "asked"
    return apps._answer(asked, Context(1, 7, node_config, RecordDict(), {}), recipe)


def ask(ward: Ward, frame: Frame) -> Message:
    return answered(to_records(frame), {"fedexlora-node": str(ward.config)})


def sent_bytes(message: Message) -> bytes:
    """Every byte of a reply that Flower sends."""

    def of(part: Any) -> bytes:
        return part.deflate() + b"".join(of(child) for child in (part.children or {}).values())

    return of(message)


def code_of(message: Message) -> NodeFault:
    (code,) = from_records(message.content).header.values()
    return NodeFault(code)


def values(ward: Ward) -> st.SearchStrategy[Any]:
    """What a hostile server puts where something else is expected."""
    words = [*ward.words, "", "x" * 50, "/etc/passwd", "(a+)+$", "\x1b[2J", "agreed"]
    numbers = [None, True, -1, 0, 3, 10**30, 0.5, float("nan"), float("inf")]
    plain = st.sampled_from([*words, *numbers])
    return st.one_of(plain, st.lists(plain, max_size=3), st.dictionaries(st.text(), plain))


def tasks(ward: Ward) -> st.SearchStrategy[dict[str, Any]]:
    """Tasks of every kind, about columns that there are, and that there are not."""
    others = (ward.secret, ward.gone, "number", "no such column")
    column = st.sampled_from([*(ward.text, ward.label) * 4, *others])
    label = st.sampled_from([*ward.labels, *ward.cells[:2], "a guess", 0, 1])
    all_labels = st.one_of(st.just(list(ward.labels)), st.lists(label, min_size=2, max_size=3))
    length = {"max_length": st.sampled_from([1, 2, 128, 10**6])}
    return st.one_of(
        st.fixed_dictionaries(
            {"kind": st.just("classification"), "text": column, "label": column}
            | {"labels": all_labels},
            optional=length,
        ),
        st.fixed_dictionaries({"kind": st.just("regression"), "text": column, "label": column}),
        st.fixed_dictionaries({"kind": st.just("causal-lm"), "text": column}, optional=length),
        st.fixed_dictionaries(
            {"kind": st.just("causal-lm"), "prompt": column, "completion": column},
            optional={"prompt_template": st.sampled_from(["{prompt}", "Say {prompt}!", ""])}
            | {"completion_template": column.map("{{completion}} {{{}}}".format)},
        ),
        *[st.just(ward.recipe()["task"])] * 2,
    )


def recipes(ward: Ward) -> st.SearchStrategy[dict[str, Any]]:
    """The good recipe with another task, or with fields of any table that hold anything."""
    fields = {
        "task": [*permission.TASK_COLUMNS, *permission.TASK_OPTIONS],
        "model": ["source", "revision", "dtype", "quantization"],
        "partition": [*permission.PARTITION_COLUMNS, *permission.PARTITION_OPTIONS],
        "lora": ["r", "target_modules", "rank_pattern", "modules_to_save", "layers_pattern"],
        "training": ["learning_rate", "optim", "optim_args", "max_steps", "logging_dir"],
        "method": ["name", "next_adapter", "momentum"],
        "federation": ["seed", "placement"],
        "clients": ["north"],
        "data": ["source", "train"],
    }
    places = [(table, field) for table in sorted(fields) for field in sorted(fields[table])]
    fitting = {
        ("model", "source"): ["broken", "agreed"],
        ("lora", "target_modules"): [["query"], [ward.secret], "all-linear", f".*{ward.text}"],
        ("lora", "modules_to_save"): [["pooler"], [ward.label], []],
        ("lora", "r"): [1, 10**6],
        ("training", "optim"): ["sgd", ward.label],
        ("partition", "kind"): ["iid", "dirichlet", "by_column"],
        ("partition", "column"): list(ward.words[:4]),
        ("clients", "north"): [{"lora": {"r": 3}}, {"lora": {"rank_pattern": {ward.label: 3}}}],
    }

    def change(place: tuple[str, str]) -> st.SearchStrategy[tuple[tuple[str, str], Any]]:
        found = st.sampled_from(fitting[place]) if place in fitting else values(ward)
        return st.tuples(st.just(place), st.one_of(found, values(ward)))

    def changed(task: dict[str, Any], changes: list[tuple[tuple[str, str], Any]]) -> Any:
        made = {**ward.recipe(), "task": dict(task)}
        for (table, field), value in changes:
            made[table] = {**made.get(table, {}), field: value}
        return json.loads(json.dumps(made))

    changes = st.sampled_from([*places, *fitting]).flatmap(change)
    return st.builds(changed, tasks(ward), st.one_of(st.just([]), st.lists(changes, max_size=1)))


PROPERTY = settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.usefixtures("desk")
@PROPERTY
@given(data=st.data())
def test_no_word_of_a_node_leaves_it_whatever_a_server_asks(ward, capfd, data):
    capfd.readouterr()
    recipe = data.draw(st.one_of(*[recipes(ward)] * 7, values(ward)))
    header = data.draw(st.fixed_dictionaries({}, optional={"round": values(ward)}))
    kind = data.draw(st.sampled_from(["hello", "hello", "train", ward.secret]))
    base = data.draw(st.sampled_from([ward.base, ward.base, "other"]))
    asked = request(recipe, base, kind=kind, **header)
    parts = data.draw(st.sampled_from([{}, {"message": b"no message"}]))
    message = ask(ward, Frame(asked.header, parts))
    check(ward, message)
    printed = "".join(capfd.readouterr())
    assert not [w for w in ward.words if w in printed]


def check(ward: Ward, message: Message) -> None:
    """The reply says nothing but codes, numbers and the node's agreed name."""
    sent = sent_bytes(message)
    assert not [w for w in ward.words if w.encode() in sent]
    assert not message.has_error()
    header = from_records(message.content).header
    if header.keys() <= {"failure", "missed"}:
        assert len(header) == 1
        code_of(message)
    else:
        assert header == {"client": "north", "rows": 6}


@pytest.fixture
def training(ward, desk) -> Frame:
    """A request to train that the node can answer."""
    assert desk.answer(request(ward.recipe(), ward.base)).header == {"client": "north", "rows": 6}
    state = desk._session._trainer.model.initial_state()
    delivery = deliver(History(4), state, None)
    more = {"round": 1, **announcing(delivery)}
    header = request(ward.recipe(), ward.base, kind="train", **more).header
    return Frame(header, {"message": delivery.message})


def test_a_node_that_trains_sends_numbers_and_factors(ward, training):
    message = ask(ward, training)
    assert from_records(message.content).header.keys() == {"seconds"}
    assert from_records(message.content).parts.keys() == {"update"}
    sent = sent_bytes(message)
    assert not [w for w in ward.words if w.encode() in sent]
    other = ask(ward, Frame({**training.header, "base": "other"}, training.parts))
    assert code_of(other) is NodeFault.BASE_DIFFERS
    cut = {"message": training.parts["message"][:-9]}
    damaged = ask(ward, Frame({**training.header, "round": 2}, cut))
    assert from_records(damaged.content).header == {"missed": NodeFault.VERSION_MISSING}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError, NodeFault.OUT_OF_MEMORY),
        (torch.OutOfMemoryError, NodeFault.OUT_OF_MEMORY),
        (KeyError, NodeFault.TRAINING_FAILED),
        (DataError, NodeFault.TRAINING_FAILED),
    ],
)
def test_what_goes_wrong_in_training_is_a_code(ward, desk, training, monkeypatch, error, code):
    def fail(*_: object) -> None:
        raise error(ward.cells[0])

    monkeypatch.setattr(desk._session._trainer, "update", fail)
    asked = Frame({**training.header, "round": 2}, training.parts)
    message = ask(ward, asked)
    assert code_of(message) is code
    check(ward, message)


@pytest.fixture
def alone(ward, tmp_path) -> Ward:
    """The same node with a home and a configuration of its own."""
    (tmp_path / "home").mkdir()
    config = tmp_path / "node.toml"
    text = ward.config.read_text()
    config.write_text(text.replace(f'"{ward.config.parent}/home"', f'"{tmp_path}/home"'))
    return replace(ward, config=config)


@pytest.fixture
def trained(monkeypatch) -> list[int]:
    """The rounds in which a node of this process has trained."""
    rounds = []
    update = LocalClients.update

    def counted(trainer, client, state, round_, *more):
        rounds.append(round_)
        return update(trainer, client, state, round_, *more)

    monkeypatch.setattr(LocalClients, "update", counted)
    return rounds


def test_a_worker_killed_before_its_answer_is_taken_answers_without_training(
    alone, training, trained
):
    """Also a server that was resumed, and has packed the same version in other bytes."""
    answer = Desk(alone.config).answer(training)
    again = Desk(alone.config)
    assert again.answer(training) == answer
    assert again.answer(Frame(training.header, {"message": b"packed anew"})) == answer
    assert trained == [1]
    assert again._session._trainer is None


def test_an_answer_whose_worker_goes_before_it_has_sent_it_is_sent_without_training(
    alone, training, trained, monkeypatch
):
    def lost(connection: object) -> Frame:
        Desk(alone.config).answer(training)
        raise EOFError

    monkeypatch.setattr(worker, "_connected", lambda path, node: io.BytesIO())
    monkeypatch.setattr(worker, "send", lambda connection, frame: None)
    monkeypatch.setattr(worker, "receive", lost)
    answer = ask_worker(alone.config, training)
    assert answer == Desk(alone.config).answer(training)
    assert trained == [1]
    with pytest.raises(NodeError, match="the worker has gone"):
        ask_worker(alone.config, Frame({**training.header, "round": 2}, training.parts))


@pytest.mark.parametrize("change", ["round", "run", "learning rate", "configuration"])
def test_an_answer_is_one_to_its_own_request_alone(alone, training, trained, change):
    Desk(alone.config).answer(training)
    header = dict(training.header)
    if change == "configuration":
        alone.config.write_text(alone.config.read_text() + "\n[limits]\nmax_rank = 4\n")
    elif change == "learning rate":
        rate = {**header["recipe"]["training"], "learning_rate": 0.5}
        header["recipe"] = {**header["recipe"], "training": rate}
    else:
        header[change] = {"round": 2, "run": "another"}[change]
    again = Desk(alone.config)
    last = again.answer(Frame(header, training.parts))
    assert trained == [1, header["round"]]
    assert Desk(alone.config).answer(Frame(header, training.parts)) == last
    assert len(trained) == 2  # the file holds one answer, the last
    assert [path.name for path in (alone.config.parent / "home").glob("answer*")] == ["answer"]


@pytest.mark.parametrize("damage", ["cut off", "longer", "changed", "no JSON", "huge", "empty"])
def test_an_answer_that_is_damaged_is_passed_over_with_a_line_in_the_log(
    alone, training, trained, damage, caplog
):
    first = Desk(alone.config).answer(training)
    file = alone.config.parent / "home" / "answer"
    content = file.read_bytes()
    line, _, parts = content.partition(b"\n")
    size = str(len(parts)).encode()
    file.write_bytes(
        {
            "cut off": content[:-1],
            "longer": content + b"x",
            "changed": content[:-1] + bytes([content[-1] ^ 1]),
            "no JSON": content[1:],
            "huge": line.replace(size, b"9" * 15) + b"\n" + parts,
            "empty": b"",
        }[damage]
    )
    again = Desk(alone.config).answer(training)
    assert unpack(again.parts["update"])[1] == unpack(first.parts["update"])[1]
    assert trained == [1, 1]
    assert f"{file} cannot be read, and is passed over" in caplog.text
    assert Desk(alone.config).answer(training) == again
    assert trained == [1, 1]


def test_a_node_whose_disk_takes_no_answer_sends_it_and_says_so(
    alone, training, trained, monkeypatch, caplog
):
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answer_file, "replace_bytes", full)
    assert Desk(alone.config).answer(training).parts.keys() == {"update"}
    assert "answer cannot be written: No space left on device" in caplog.text
    assert trained == [1]


@pytest.mark.usefixtures("desk")
def test_not_allowed_not_there_and_unfit_are_one_answer_to_the_byte(ward):
    def reply(**changes: object) -> bytes:
        recipe = ward.recipe()
        return sent_content(ask(ward, request({**recipe, "task": recipe["task"] | changes}, "")))

    same = {
        reply(text=ward.secret),
        reply(text="no such column"),
        reply(text=ward.gone),
        reply(label=ward.text),
        reply(labels=[ward.labels[0], "a guess"]),
        reply(labels=["two", "guesses"]),
        reply(labels=[*ward.labels, ward.cells[0]]),
        reply(kind="regression", labels=None),
    } - {reply(labels=7)}
    assert len(same) == 1
    assert NodeFault.TASK_REFUSED.encode() in same.pop()


def sent_content(message: Message) -> bytes:
    return sent_bytes(SimpleNamespace(deflate=lambda: b"", children={"": message.content}))


@pytest.mark.usefixtures("desk")
def test_what_is_not_allowed_is_refused_before_a_row_is_read(ward, monkeypatch):
    def read(*_: object) -> None:
        raise AssertionError("a row was read")

    monkeypatch.setattr(session, "prepare_client", read)
    recipe = ward.recipe()
    for text in (ward.secret, "no such column"):
        asked = {**recipe, "task": recipe["task"] | {"text": text}}
        assert code_of(ask(ward, request(asked))) is NodeFault.TASK_REFUSED


def test_an_error_that_nobody_expects_is_a_code(ward, monkeypatch):
    """What a ClientApp raises would be sent by Flower, text and all."""

    def broken(path: Path, frame: Frame) -> Frame:
        raise KeyError(ward.secret)

    monkeypatch.setattr(worker, "ask_worker", broken)
    message = ask(ward, request(ward.recipe()))
    assert code_of(message) is NodeFault.INTERNAL
    check(ward, message)


def test_a_message_of_something_else_is_a_code(ward):
    message = answered(RecordDict(), {"fedexlora-node": str(ward.config)})
    assert code_of(message) is NodeFault.REQUEST_INVALID


@pytest.mark.parametrize("name", ["gone.toml", "wrong.toml"])
def test_a_configuration_that_is_wrong_is_a_code(tmp_path, name):
    (tmp_path / "wrong.toml").write_text('client = "secret name"\n')
    message = answered(to_records(request({})), {"fedexlora-node": str(tmp_path / name)})
    assert code_of(message) is NodeFault.CONFIGURATION_INVALID


@pytest.mark.parametrize("config", [{}, {"partition-id": 0, "num-partitions": 2}])
def test_a_supernode_without_a_configuration_is_refused(config, tmp_path):
    """Also one that has a partition's number: the app's recipe comes from the server."""
    message = answered(to_records(request({})), config, tmp_path / "recipe.toml")
    assert code_of(message) is NodeFault.NOT_CONFIGURED


def test_a_simulated_client_obeys_no_recipe_but_its_own(ward, tmp_path, monkeypatch):
    from fedexlora.rounds.recipe import parse_recipe

    own = {**ward.recipe(), "data": {"source": "/own/rows"}, "model": {"source": "/own/model"}}
    file = tmp_path / "recipe.toml"
    file.write_text(parse_recipe(own, "own").to_toml())
    monkeypatch.setattr(apps, "_in_simulation", lambda: True)
    sent = {**ward.recipe(), "data": {"source": str(ward.config.parent)}}
    message = answered(to_records(request(sent)), {"partition-id": 0}, file)
    assert code_of(message) is NodeFault.RECIPE_INVALID


def test_what_a_configuration_allows_holds_from_the_next_request(ward, tmp_path):
    config = tmp_path / "node.toml"
    config.write_text(ward.config.read_text())
    desk = Desk(config)
    header = request(ward.recipe(), ward.base)
    assert desk.answer(header).header == {"client": "north", "rows": 6}
    config.write_text(ward.config.read_text().replace(f'"{ward.text}", ', ""))
    assert desk.answer(header).header == {"failure": NodeFault.TASK_REFUSED}
    config.write_text("client = 1")
    assert desk.answer(header).header == {"failure": NodeFault.CONFIGURATION_INVALID}


def test_no_text_of_a_server_forges_or_floods_a_nodes_log():
    text = "x\n2026-01-01 INFO ready\x1b[2J" + "y" * 10**6
    record = logging.LogRecord("n", logging.ERROR, "", 0, "%s", (text,), None)
    lines = LogFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert lines[0] == "ERROR x"
    assert lines[1].startswith("    2026-01-01 INFO ready\\x1b[2J")
    assert sum(map(len, lines)) < 5000
