"""Whatever a client sends: it is escaped and bounded in log, terminal, record and file."""

from __future__ import annotations

import io
import json
import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from flwr.app import Error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedexlora.cli.terminal import JsonLines, Terminal
from fedexlora.errors import RunError, UpdateError
from fedexlora.exchange.records import LeftOutRecord, RoundRecord
from fedexlora.exchange.update import decode_update, largest_header, largest_update
from fedexlora.exchange.wire import pack
from fedexlora.flower import transport as module
from fedexlora.flower.frames import Frame
from fedexlora.flower.names import Names
from fedexlora.flower.server import LogLines
from fedexlora.flower.transport import FlowerTransport
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.observer import RunInfo
from fedexlora.texts import few, outside, printable
from tests.flower.nodes import FakeGrid
from tests.models import adapted
from tests.rounds.scripted import federation, random_update, run_round

NASTY = ("\x1b[2J", "\x9b31m", "\u202e", "\u2066", "\u2028", "\r\n", "\0", "\x7f", "[red]", "<b>")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TEXTS |= st.tuples(st.sampled_from(NASTY), st.integers(1, 2000)).map(lambda x: x[0] * x[1])
VALUES = TEXTS | st.none() | st.integers() | st.floats() | st.lists(TEXTS, max_size=9)
VALUES |= st.recursive(TEXTS, lambda x: st.lists(x, max_size=9) | st.dictionaries(TEXTS, x))
HEADERS = st.dictionaries(
    st.sampled_from(["client", "rows", "failure", "missed", "seconds", "keeps"]) | TEXTS, VALUES
)
FIELDS = st.dictionaries(
    st.sampled_from(["client", "round", "version", "num_examples", "loss", "base"]) | TEXTS,
    VALUES,
    max_size=3,
)
ERRORS = st.builds(Error, st.integers(-(2**31), 2**31 - 1), TEXTS)
OFTEN = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MOST = 5000
"""Characters of a record, a log and a terminal that one client may cause in a round."""


class Held(FlowerTransport):
    holdings = None


@cache
def model() -> AdaptedModel:
    return AdaptedModel(adapted("roberta"))


def honest(frame: Frame) -> Frame:
    if frame.header["kind"] == "hello":
        return Frame({"client": "good", "rows": 1})
    update = random_update(model(), frame.header["round"], "good", version=frame.header["version"])
    return Frame({"seconds": 0.0}, {"update": update.encode()})


@st.composite
def updates(draw) -> bytes:
    """An update with other fields, and with tensors beside or instead of the right ones."""
    good = random_update(model(), 1, "bad")
    header = {"client": "bad", "round": 1, "version": good.version, "num_examples": 1, "loss": 1.0}
    header |= {"base": good.base} | draw(FIELDS)
    tensors = dict(good.tensors) if draw(st.booleans()) else {}
    tensors |= dict.fromkeys(draw(st.lists(TEXTS, max_size=12)), torch.zeros(1, 0))
    return pack(tensors, header)


ANSWERS = st.one_of(
    ERRORS,
    st.builds(Frame, HEADERS, st.dictionaries(st.just("update") | TEXTS, st.binary(max_size=40))),
    st.builds(lambda u: Frame({"seconds": 0.0}, {"update": u}), updates()),
)


def checked(text: str, what: str, most: int) -> None:
    assert len(text) <= most, f"{what}: {len(text)}"
    assert all(" " <= c <= "~" or c == "\n" for c in text), what


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)


def shown(record: RoundRecord, capsys) -> None:
    """A record on a terminal, plain and as JSON, and in the server's log."""
    info = RunInfo("fedex", 1, {"good": 1}, 1, 1, "float32", 1, "loss", {"loss": 0.0}, 0, "cpu")
    terminal = Terminal()
    terminal.console = Console(file=io.StringIO(), highlight=False, width=200)
    terminal.started(info)
    terminal.finished_round(record)
    checked(terminal.console.file.getvalue(), "terminal", MOST)
    capsys.readouterr()
    JsonLines().finished_round(record)
    checked(capsys.readouterr().out, "JSON", 60_000)
    LogLines().finished_round(record)


def bad_node(hello: Frame, answer: Frame | Error):
    return lambda frame: hello if frame.header["kind"] == "hello" else answer


@pytest.mark.usefixtures("quick")
@OFTEN
@given(answer=ANSWERS)
def test_an_answer_of_any_kind_is_escaped_and_bounded(answer, caplog, capsys):
    caplog.set_level(logging.INFO)
    caplog.clear()
    hello = Frame({"client": "bad", "rows": 1})
    grid = FakeGrid({1: honest, 2: bad_node(hello, answer)})
    transport = Held(
        grid, {}, model().base_fingerprint, largest_update=largest_update(model().spec)
    )
    parts, state = federation(model(), "fedex", transport=transport)
    transport.gather(2, 5.0)
    _, record = run_round(parts, state)
    shown(record, capsys)
    checked(caplog.text, "log", MOST)
    for out in record.left_out:
        checked(out.model_dump_json(), "record", 3000)


@pytest.mark.usefixtures("quick")
@OFTEN
@given(hello=ERRORS | st.builds(Frame, HEADERS))
def test_a_greeting_of_any_kind_is_escaped_and_bounded(hello, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    caplog.clear()
    names = Names(tmp_path / "clients.jsonl")
    names.keep()
    transport = Held(FakeGrid({2: lambda _: hello}), {}, "base", largest_update=10, names=names)
    try:
        transport.gather(1, 0.01)
    except RunError as error:
        checked(str(error), "error", 2000)
    checked(caplog.text, "log", 2000)
    checked((tmp_path / "clients.jsonl").read_text(), "names", 400)


def test_an_update_is_refused_by_its_size_before_anything_of_it_is_read():
    spec = model().spec
    good = random_update(model(), 1, "bad")
    many = {f"x{i}": torch.zeros(0) for i in range(20_000)}
    for tensors in ({**good.tensors, "more": torch.zeros(100_000)}, many):
        message = pack(tensors, {"client": "bad"})
        with pytest.raises(UpdateError, match=r"of \d+ bytes, expected at most \d+") as caught:
            decode_update(message[:-1] + b"?", spec, 1, "bad")
        assert "checksum" not in str(caught.value)
    # Every number of an honest update as long as it can be.
    long = random_update(model(), 1, "b" * 64, base="f" * 64, num_examples=2**53, loss=-1 / 3)
    assert len(long.encode()) <= largest_update(spec)
    assert int.from_bytes(long.encode()[:8], "little") <= largest_header(spec)


@OFTEN
@given(st.lists(st.text(max_size=900) | TEXTS, max_size=30))
def test_texts_are_bounded_and_stay_as_they_are_when_they_are_read_again(texts):
    once = few(map(outside, texts))
    assert few(map(outside, once)) == once
    assert len(once) <= 6
    for text in once:
        checked(text, "line", 400)
    for text in texts:
        plain = printable(text, 300)
        assert printable(plain, 300) == plain
        assert all(c.isprintable() or c == "\n" for c in plain)
    fields = {"client": "bad", "since": None, "downloaded_bytes": 0, "uploaded_bytes": 0}
    record = LeftOutRecord(reasons=tuple(texts), **fields)
    assert len(json.dumps(record.model_dump())) < 20_000
    assert LeftOutRecord.model_validate_json(record.model_dump_json()) == record


def test_a_file_of_names_that_is_damaged_is_refused_with_every_line(tmp_path: Path):
    path = tmp_path / "clients.jsonl"
    lines = ['{"client": "a", "key": "sha256:1"}', '{"client": "../b", "key": "sha256:2"}']
    lines += ['{"client": "c", "key": 3}', '{"client": "d", "key": "sha256:1"}', "7"]
    path.write_text("\n".join(lines))
    with pytest.raises(Exception, match=r"4 fault\(s\)") as caught:
        Names(path)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "line 2",
        "line 3",
        "line 4",
        "line 5",
    ]
