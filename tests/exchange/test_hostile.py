"""Whatever bytes arrive, they are refused by name or are, bit for bit, what was sent.

No decoder raises anything else, allocates what a header claims, or loads a part of a message.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedexlora.errors import ResumeError, UpdateError, VersionError
from fedexlora.exchange.delivery import deliver, encode_own, receive, with_own
from fedexlora.exchange.history import Holdings
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.state import GlobalState, state_tensors
from fedexlora.exchange.update import check_update, decode_update
from fedexlora.exchange.wire import digest, unpack
from fedexlora.rounds.folder import Progress, RunFolder
from tests.exchange.hostile import (
    NAN,
    RAW,
    Cases,
    damaged,
    forged_headers,
    forged_tensors,
    frame,
    lying,
    parts,
    signed,
    unpacked,
)
from tests.exchange.test_wire import SPEC, update
from tests.exchange.versions import (
    Round,
    history,
    state,
    step,
    stored,
    wide_state,
    wide_steps,
)

REFUSED = "refused"
REPEATABLE = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Target:
    """One kind of message: a good one, and what reads it."""

    good: bytes
    read: Callable[[bytes], str]
    """The content, as a digest, or ``REFUSED`` if it was refused by name."""
    says: Callable[[bytes], str] | None = None
    """The content of a message that may be honest though it is another one."""


def record(round_: int) -> RoundRecord:
    certificate = {
        "placement": "fold",
        "error": 0.0,
        "bound": 0.0,
        "allowed": 1e-6,
        "truncated": 0.0,
    }
    certificate |= {"worst_module": "layer.q", "worst_error": 0.0, "dense_error": 0.0}
    certificate |= {"forward": 0.0, "worst_forward_module": "layer.q", "worst_forward": 0.0}
    certificate |= {"kept": None, "kept_error": None}
    return RoundRecord(
        round=round_,
        registered=2,
        method="fedex",
        clients=(),
        left_out=(),
        stay=0.0,
        bytes={"up": 0, "down": 0},
        deviation=0.0,
        certificate={**certificate, "own": (), "held": True},
        modules=(),
        metrics={"loss": NAN},
        seconds={},
    )


def content(held: GlobalState) -> str:
    return digest(state_tensors(held), f"{held.version} {held.id}")


def read_update(message: bytes) -> str:
    try:
        found = decode_update(message, SPEC, 3, "a")
        check_update(found, SPEC, client="a", round_=3, version="v2", base="the base")
    except UpdateError as error:
        return REFUSED if error.faults else "no fault is named"
    return digest(found.tensors, f"{found.num_examples} {found.loss}")


def said_update(message: bytes) -> str:
    tensors, header = unpack(message)
    return digest(tensors, f"{header['num_examples']} {header['loss']}")


def reader(read: Callable[[bytes], GlobalState]) -> Callable[[bytes], str]:
    def found(message: bytes) -> str:
        try:
            return content(read(message))
        except VersionError as error:
            return REFUSED if str(error) else "no fault is named"

    return found


def described(state: GlobalState, held: Mapping[str, int]) -> str:
    return digest(state_tensors(state), f"{state.id} {sorted(held.items())}")


def step_reader(folder: RunFolder, before: str) -> Callable[[bytes], str]:
    """The newest of two steps; the version before it is whole and takes its place."""
    path = folder.store.step_file(2)

    def found(message: bytes) -> str:
        path.write_bytes(message)
        progress = folder.load(4)
        if progress.damaged:
            named = [*progress.damaged] == [path] and str(path) in progress.damaged[path]
            whole = content(progress.state) == before and len(progress.records) == 1
            return REFUSED if named and whole else "half of the version before"
        rounds = [record.round for record in progress.records]
        return f"{rounds} {described(progress.state, progress.holdings.versions)}"

    return found


def snapshot_reader(folder: RunFolder) -> Callable[[bytes], str]:
    """The only snapshot of a folder."""
    path = folder.store.snapshot_file(2)

    def found(message: bytes) -> str:
        path.write_bytes(message)
        try:
            progress = folder.load(4)
        except ResumeError as error:
            return REFUSED if str(path) in str(error) else f"refused by {error}"
        return digest(
            state_tensors(progress.state), f"{sorted(progress.holdings.versions.items())}"
        )

    return found


def said_snapshot(message: bytes) -> str:
    tensors, header = unpacked(message)
    return digest(tensors, f"{sorted(header['held'].items())}")


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_disks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def save(folder: RunFolder, before: GlobalState, made: Round, reached: Progress, held) -> None:
    """Make a round durable whose step was made in memory."""
    stored(folder.store.sink(before, ("A", "B"), {"b": "b"}, held), *made, held)
    folder.save(reached.state, reached.holdings, reached.records[-1])


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    torch.manual_seed(0)
    begun, wide = state(0), wide_state()
    first = step(begun)
    second = step(first[1])
    server, taken = second[1], wide_steps(2, wide)
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.store.path.mkdir()
    records = (record(1), record(2))
    folder.begin(begun, Holdings({}, history()))
    save(folder, begun, first, Progress(first[1], records[:1], Holdings({}, history(first))), {})
    landed = {"a": 1, "b": 0}
    held = Holdings(landed, history(first, second))
    save(folder, first[1], second, Progress(server, records, held), landed)
    whole = RunFolder(tmp_path_factory.mktemp("whole"))
    whole.store.path.mkdir()
    whole.store.add_snapshot(server, held)
    shutil.copy(folder.path / "rounds.jsonl", whole.path)
    lead, newest = deliver(history(*taken), taken[-1][1], 0), deliver(history(), server, None)
    path, own = folder.store.step_file(2), encode_own(server, "b")

    def said_step(message: bytes) -> str:
        held = {c: v for c, v in unpacked(message)[1]["held"].items() if v is not None}
        return f"[1, 2] {described(server, held)}"

    return {
        "update": Target(update().encode(), read_update, said_update),
        "snapshot": Target(newest.message, reader(lambda m: receive(None, newest.announced, m))),
        "steps": Target(lead.message, reader(lambda m: receive(wide, lead.announced, m))),
        "own": Target(
            own, reader(lambda m: with_own(server.common(), m, "b", second[0].digests.own))
        ),
        "step file": Target(path.read_bytes(), step_reader(folder, content(first[1])), said_step),
        "snapshot file": Target(
            whole.store.snapshot_file(2).read_bytes(), snapshot_reader(whole), said_snapshot
        ),
    }


KINDS = ("update", "snapshot", "steps", "own", "step file", "snapshot file")


def faults(target: Target, cases: Cases, allowed: Collection[str] = ()) -> list[str]:
    """The cases that are neither refused nor of an allowed content, or end in another error."""
    found = []
    for case, message in cases:
        try:
            outcome = target.read(message)
        except Exception as error:  # noqa: BLE001 - that there is none is what is tested
            outcome = f"{type(error).__name__}: {error}"[:200]
        if outcome != REFUSED and outcome not in allowed:
            found.append(f"{case}: {outcome}")
    return found


@cache
def memory() -> int:
    """The most that the process held when this was first called, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def unsigned_cases(targets: Mapping[str, Target], kind: str) -> list[tuple[str, bytes]]:
    good = targets[kind].good
    others = {name: target.good for name, target in targets.items()}
    return [*damaged(good, others)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_message_is_refused_or_is_what_was_sent(targets, kind):
    good = targets[kind].read(targets[kind].good)
    assert good != REFUSED
    assert not faults(targets[kind], unsigned_cases(targets, kind), [good])


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_lies_about_its_tensors_is_refused_and_allocates_nothing(targets, kind):
    memory()
    good = targets[kind].read(targets[kind].good)
    assert not faults(targets[kind], lying(targets[kind].good), [good])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory()
    assert grown < 200 * 1024


@pytest.mark.parametrize("kind", KINDS)
def test_a_signed_header_of_other_values_is_refused(targets, kind):
    assert not faults(targets[kind], forged_headers(targets[kind].good))


@pytest.mark.parametrize("kind", KINDS)
def test_signed_tensors_that_do_not_belong_together_are_refused(targets, kind):
    assert not faults(targets[kind], forged_tensors(targets[kind].good))


def test_there_are_thousands_of_different_messages(targets):
    messages = {
        (kind, message)
        for kind in KINDS
        for cases in (lying, forged_headers, forged_tensors, partial(unsigned_cases, targets))
        for _, message in cases(kind if isinstance(cases, partial) else targets[kind].good)
    }
    assert len(messages) >= 2000


EDITS = st.lists(
    st.tuples(st.sampled_from("=+-x"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


def edited(message: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes overwritten, inserted, removed or doubled, at places relative to the length."""
    for kind, where, what in edits:
        i = int(where * len(message))
        after = {
            "=": what + message[i + len(what) :],
            "+": what + message[i:],
            "-": message[i + len(what) :],
            "x": message[i : i + 40] + message[i:],
        }
        message = message[:i] + after[kind]
    return message


@REPEATABLE
@given(kind=st.sampled_from(KINDS), edits=EDITS)
def test_any_edit_is_refused_or_changes_nothing(targets, kind, edits):
    message = edited(targets[kind].good, edits)
    good = targets[kind].read(targets[kind].good)
    assert not faults(targets[kind], iter([("edit", message)]), [good])


@REPEATABLE
@given(kind=st.sampled_from(KINDS), edits=EDITS)
def test_any_edit_of_a_signed_header_is_refused_or_read_as_it_is(targets, kind, edits):
    header, body = parts(targets[kind].good)
    text = edited(header["__metadata__"]["fedexlora"].encode(), edits).decode("utf-8", "replace")
    message = signed(header, body, text)
    assert not faults(targets[kind], iter([("edit", message)]), honest(targets[kind], message))


def honest(target: Target, message: bytes) -> list[str]:
    """What may be read of a message: what the good one holds, or what it says itself."""
    allowed = [target.read(target.good)]
    with suppress(ValueError, KeyError, AttributeError, TypeError):
        allowed += [target.says(message)] if target.says else []
    return allowed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@REPEATABLE
@given(kind=st.sampled_from(KINDS), value=JSON, data=st.data())
def test_any_value_of_a_signed_header_is_refused_or_read_as_it_is(targets, kind, value, data):
    header, body = parts(targets[kind].good)
    own = unpacked(targets[kind].good)[1]
    key = data.draw(st.sampled_from(sorted(own)))
    message = signed(header, body, json.dumps(own | {key: value}))
    changed = (kind, key, type(value)) in HONEST or (value, type(value)) == (
        own[key],
        type(own[key]),
    )
    allowed = honest(targets[kind], message) if changed else []
    assert not faults(targets[kind], iter([(key, message)]), allowed)


HONEST = {
    ("update", "num_examples", int),
    ("update", "loss", float),
    ("step file", "held", dict),
    ("snapshot file", "held", dict),
    ("snapshot file", "id", str),
}
"""Where another value of that type is another honest message."""


@REPEATABLE
@given(kind=st.sampled_from(KINDS), header=JSON, body=st.binary(max_size=40))
def test_any_safetensors_header_is_refused(targets, kind, header, body):
    assert not faults(targets[kind], iter([("header", frame(header, body))]))


@pytest.mark.parametrize("value", [*RAW, "Infinity"])
def test_a_damaged_run_header_is_a_resume_error(tmp_path, value):
    folder = RunFolder(Path(tmp_path))
    for text in (value, f'{{"data": {value}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ResumeError, match="run.json is damaged"):
            folder.read_header()
