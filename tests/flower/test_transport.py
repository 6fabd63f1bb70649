"""The engine over Flower's grid: the same model as in one process, whatever nodes do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from flwr.app import Error
from safetensors.torch import load_file

from fedexlora.errors import RecipeError, RunError
from fedexlora.exchange.digest import tensors_digest
from fedexlora.exchange.node_faults import FAULT_TEXTS, NodeFault
from fedexlora.flower import byte_arrays
from fedexlora.flower import transport as module
from fedexlora.flower.frames import Frame
from fedexlora.flower.node import Node
from fedexlora.flower.server import Settings, serve
from fedexlora.flower.session import Session
from fedexlora.methods import METHODS
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.flower.nodes import FakeGrid
from tests.rounds.conftest import files, recipe_document, records_without_times

CLIENTS = ("site-north", "site-south", "site-west")


def node(client: str, document: dict, home: Path, **changes) -> Node:
    data = {"source": document["data"]["source"], "share": client}
    source = document["model"]["source"]
    task = {"kinds": ["classification"], "columns": ["text", "label", "site"], "labels": ["y", "x"]}
    fields = {"client": client, "home": home / client, "data": data, "models": {source: source}}
    return Node.model_validate(fields | {"task": task} | changes)


def session(client: str, document: dict, home: Path, **changes) -> Session:
    made = node(client, document, home, **changes)
    made.home.mkdir(parents=True, exist_ok=True)
    return Session(made, made.home / "held.safetensors")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)


@pytest.fixture
def document(bert, data_folder) -> dict:
    return recipe_document(bert, data_folder)


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> Path:
    """Where nodes keep what they hold from one test, that is one server, to the next."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def loaded(bert, data_folder, homes) -> dict[int, Session]:
    document = recipe_document(bert, data_folder)
    return {7 + i: session(name, document, homes) for i, name in enumerate(CLIENTS)}


@pytest.fixture
def sessions(loaded) -> dict[int, Session]:
    return dict(loaded)


def grid_of(sessions: dict[int, Session]) -> FakeGrid:
    return FakeGrid({number: one.answer for number, one in sessions.items()})


def start(grid: FakeGrid, document: dict, out: Path, **changes):
    fields = {"nodes": len(grid.nodes), "wait": 0.2} | changes
    settings = Settings(out=out, **fields)  # every node answers when it is asked
    return serve(grid, parse_recipe(document, "test"), settings, Observer())


@pytest.mark.exactness
def test_the_result_is_that_of_one_process_to_the_bit(
    document, sessions, homes, tmp_path, whole, monkeypatch
):
    """Also in many pieces, and where another server resumes it with nodes that started anew."""
    monkeypatch.setattr(byte_arrays, "PIECE", 1000)
    grid = grid_of(sessions)
    grid.keys = {7 + i: name.encode() for i, name in enumerate(CLIENTS)}
    document["federation"]["rounds"] = 2
    start(grid, document, tmp_path / "out")
    document["federation"]["rounds"] = 3
    again = grid_of({n: session(c, document, homes) for n, c in enumerate(CLIENTS)})
    again.keys = {i: name.encode() for i, name in enumerate(CLIENTS)}
    result = start(again, document, tmp_path / "out")
    assert records_without_times(tmp_path / "out") == records_without_times(whole)
    assert files(result.adapter) == files(whole / "adapter")
    moved = [record.bytes.down for record in result.records]
    assert moved[2] > 0
    asked = [frame for _, frame in grid.pushed if frame.header["kind"] == "train"]
    assert len({frame.header["run"] for frame in asked}) == 1
    parts = [sum(map(len, frame.parts.values())) for frame in asked]
    assert sum(moved[:2]) == sum(parts)


OTHERS = [name for name, x in METHODS.items() if name != "fedex" and not x.default.pooled]


@pytest.mark.exactness
@pytest.mark.parametrize("method", OTHERS)
def test_every_method_ends_with_the_records_and_memory_of_one_process(document, tmp_path, method):
    """Two of three nodes a round; all of them, and the server, start anew after the second."""
    document["method"] = {"name": method}
    if METHODS[method].default.start:
        document["lora"]["init_lora_weights"] = METHODS[method].default.start[0]
    document["federation"] |= {"rounds": 4, "clients_per_round": 2}
    if METHODS[method].default.personal:
        document["evaluation"] = {"where": "clients", "holdout": 0.3}
        document["task"] = document["task"] | {"labels": ["x", "y"]}
    local = run(parse_recipe(document, "test"), tmp_path / "local")
    for rounds in (2, 4):
        document["federation"]["rounds"] = rounds
        grid = grid_of({n: session(c, document, tmp_path / "nodes") for n, c in enumerate(CLIENTS)})
        grid.keys = {i: name.encode() for i, name in enumerate(CLIENTS)}
        start(grid, document, tmp_path / "out")
    assert records_without_times(tmp_path / "out") == records_without_times(local.folder)
    if not METHODS[method].default.personal:
        assert files(tmp_path / "out" / "adapter") == files(local.adapter)
    else:
        scored = [x.client for x in local.finish.clients]
        assert len(scored) == 2
        for client in scored:
            node = tmp_path / "nodes" / client / "adapter"
            assert files(node) == files(local.adapter / client)
    for client in CLIENTS:
        here = sorted((local.folder / "memory").glob(f"{client}/*"))
        there = sorted((tmp_path / "nodes" / client / "memory").glob(f"{client}/*"))
        assert [x.name for x in here] == [x.name for x in there]
        for mine, theirs in zip(here, there, strict=True):
            assert tensors_digest(load_file(mine)) == tensors_digest(load_file(theirs))


@pytest.mark.exactness
def test_a_node_that_lost_its_memory_starts_anew_and_the_record_says_so(document, tmp_path):
    document |= {"method": {"name": "fedsa"}, "evaluation": {"where": "clients", "holdout": 0.3}}
    document["task"] = document["task"] | {"labels": ["x", "y"]}
    for rounds in (2, 3):
        document["federation"]["rounds"] = rounds
        grid = grid_of({n: session(c, document, tmp_path / "nodes") for n, c in enumerate(CLIENTS)})
        grid.keys = {i: name.encode() for i, name in enumerate(CLIENTS)}
        result = start(grid, document, tmp_path / "out")
        shutil.rmtree(tmp_path / "nodes" / CLIENTS[1] / "memory")
    found = [[c.memory for c in record.clients] for record in result.records]
    assert found == [[0, 0, 0], [1, 1, 1], [2, 0, 2]]


def test_a_method_that_needs_all_rows_in_one_place_is_not_for_nodes(document, sessions, tmp_path):
    document["method"] = {"name": "centralised"}
    with pytest.raises(RecipeError, match="nodes keep theirs"):
        start(grid_of(sessions), document, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["server", "none"])
def test_a_server_cannot_score_models_that_it_has_not(document, sessions, tmp_path, where):
    document |= {"method": {"name": "fedsa"}, "evaluation": {"where": where}}
    with pytest.raises(RecipeError, match="the server has none of them to score"):
        start(grid_of(sessions), document, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nodes_are_told_nothing_of_the_servers_data(document, sessions, tmp_path):
    grid = grid_of(sessions)
    document["federation"]["rounds"] = 1
    start(grid, document, tmp_path / "out")
    for _, frame in grid.pushed:
        assert "data" not in frame.header["recipe"]
        assert document["data"]["source"] not in json.dumps(frame.header)


def test_a_node_that_goes_and_comes_back_catches_up(document, sessions, tmp_path):
    grid = grid_of(sessions)
    lost = sessions[8]
    calls = []

    def flaky(frame: Frame):
        calls.append(frame.header.get("round"))
        if frame.header.get("round") == 2:
            return Error(5, "Node Unavailable")
        return lost.answer(frame)

    grid.nodes[8] = flaky
    document["federation"]["rounds"] = 4
    result = start(grid, document, tmp_path / "out")
    assert [len(r.clients) for r in result.records] == [3, 2, 3, 3]
    assert result.records[1].left_out[0].client == "site-south"
    assert "node unavailable" in result.records[1].left_out[0].reasons[0]
    back = next(c for c in result.records[2].clients if c.client == "site-south")
    assert back.since == 0
    assert all(r.certificate.held for r in result.records)


def test_a_request_whose_process_was_lost_is_asked_again_and_not_trained_again(
    document, sessions, tmp_path, monkeypatch
):
    grid = grid_of(sessions)
    slow = sessions[8]
    trained, asked = [], []
    update = slow._trained
    monkeypatch.setattr(slow, "_trained", lambda frame: trained.append(frame) or update(frame))

    def lost(frame: Frame):
        answer = slow.answer(frame)
        if frame.header["kind"] == "hello":
            return answer
        asked.append(frame.header["round"])
        crashed = Error(8, "ClientApp stopped responding.")
        return crashed if asked.count(1) < 3 or frame.header["round"] == 2 else answer

    grid.nodes[8] = lost
    document["federation"]["rounds"] = 2
    first, second = start(grid, document, tmp_path / "out").records
    assert asked == [1] * 3 + [2] * 5
    assert [frame.header["round"] for frame in trained] == [1, 2]
    sizes = {c.client: c.downloaded_bytes for c in first.clients}
    assert sizes["site-south"] == 3 * sizes["site-north"]
    (out,) = second.left_out
    assert (out.client, out.downloaded_bytes) == (
        "site-south",
        5 * second.clients[0].downloaded_bytes,
    )
    assert out.reasons == (
        "the process of the message did not start in time, or stopped (Flower's code 8)",
    )


def test_a_node_that_lost_its_disk_takes_the_total_in_the_same_round(document, sessions, tmp_path):
    grid = grid_of(sessions)

    def wiped(frame: Frame):
        if frame.header.get("round") == 3 and not grid.nodes.pop("wiped", None):
            grid.nodes["wiped"] = True
            sessions[9] = session("site-west", document, tmp_path / "new")
        return sessions[9].answer(frame)

    grid.nodes[9] = wiped
    grid.get_node_ids = lambda: [7, 8, 9]
    result = start_with(grid, document, tmp_path / "out")
    last = result.records[2]
    assert [c.client for c in last.clients] == list(CLIENTS)
    sizes = {c.client: c.downloaded_bytes for c in last.clients}
    assert sizes["site-west"] > sizes["site-north"]


def test_an_answer_of_a_run_that_was_rolled_back_is_refused_by_name(document, sessions, tmp_path):
    """The server goes on from version 1, and comes to another version 2 than before."""
    grid, out = grid_of(sessions), tmp_path / "out"
    document["federation"]["rounds"] = 1
    start(grid, document, out)
    shutil.copytree(out, tmp_path / "version-1")
    answers = {}

    def remembers(frame: Frame):
        answer = sessions[8].answer(frame)
        answers[frame.header.get("round")] = answer
        return answer

    grid.nodes[8] = remembers
    document["federation"]["rounds"] = 3
    start(grid, document, out)
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "version-1", out)

    def stuck(frame: Frame):
        training = frame.header["kind"] == "train"
        return answers[3] if training else sessions[8].answer(frame)

    grid.nodes[8] = stuck
    result = start(grid, document, out)
    second, third = ([(c.client, c.reasons) for c in r.left_out] for r in result.records[1:])
    assert [client for client, _ in (*second, *third)] == ["site-south"] * 2
    round_, version = second[0][1]
    assert round_ == "round: expected 2, found 3"
    assert version.startswith("version: expected")
    (version,) = third[0][1]
    assert version.startswith("version: expected")
    for record in result.records[1:]:
        assert [c.client for c in record.clients] == ["site-north", "site-west"]
        assert record.certificate.held


def test_an_answer_to_a_run_that_was_started_anew_is_refused_by_name(document, sessions, tmp_path):
    grid, out = grid_of(sessions), tmp_path / "out"
    document["federation"]["rounds"] = 1
    start(grid, document, out)
    first = next(frame for node, frame in grid.pushed if node == 8 and frame.parts)
    shutil.rmtree(out)
    document["federation"]["seed"] += 1

    def stuck(frame: Frame):
        return sessions[8].answer(first if frame.parts else frame)

    grid.nodes[8] = stuck
    (record,) = start(grid, document, out).records
    (left,) = record.left_out
    assert left.client == "site-south"
    assert left.reasons[0].startswith("version: expected")
    second = grid.pushed[-1][1]
    assert first.header["run"] != second.header["run"]


def start_with(grid: FakeGrid, document: dict, out: Path):
    settings = Settings(out=out, nodes=3, wait=5.0)
    return serve(grid, parse_recipe(document, "test"), settings, Observer())


def test_replies_that_are_late_twice_tampered_or_strange(document, sessions, tmp_path):
    grid = grid_of(sessions)
    document["federation"] |= {"rounds": 3, "deadline": 60.0}

    def odd(frame: Frame):
        good = sessions[8].answer(frame)
        match frame.header.get("round"):
            case 1:
                return Frame(good.header, {"update": good.parts["update"][:-9]})
            case 2:
                tampered = bytearray(good.parts["update"])
                tampered[-1] ^= 1
                return Frame(good.header, {"update": bytes(tampered)})
            case 3:
                return Frame({"nonsense": 1}, {})
        return good

    grid.nodes[8] = odd
    result = start(grid, document, tmp_path / "out")
    reasons = [r.left_out[0].reasons[0] for r in result.records]
    assert "not a safetensors message" in reasons[0]
    assert "checksum" in reasons[1]
    assert reasons[2] == "its reply has no update"
    assert all([c.client for c in r.clients] == ["site-north", "site-west"] for r in result.records)


def test_no_answer_within_the_deadline_is_named_and_the_node_is_not_asked_again(
    document, sessions, tmp_path
):
    grid = grid_of(sessions)
    document["federation"] |= {"rounds": 3, "deadline": 0.2}

    def hangs(frame: Frame):
        if frame.header.get("round") == 1:
            return None
        return sessions[8].answer(frame)

    grid.nodes[8] = hangs
    result = start(grid, document, tmp_path / "out")
    reasons = [[(c.client, c.reasons) for c in r.left_out] for r in result.records]
    late = "late: no answer within the round's deadline, 0.2 s"
    busy = "it still works for round 1"
    assert reasons == [
        [("site-south", (late,))],
        [("site-south", (busy,))],
        [("site-south", (busy,))],
    ]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"models": {"other": "x"}}, NodeFault.MODEL_REFUSED),
        ({"limits": {"max_rank": 1}}, NodeFault.LIMIT_EXCEEDED),
        ({"data": {"source": "/nowhere"}}, NodeFault.TASK_REFUSED),
    ],
)
def test_a_node_that_refuses_is_named_with_its_code(document, sessions, tmp_path, changes, code):
    sessions[8] = session("site-south", document, tmp_path, **changes)
    grid = grid_of(sessions)
    with pytest.raises(RunError, match="2 of 3 nodes were ready") as caught:
        start(grid, document, tmp_path / "out")
    assert caught.value.faults == (f"node 8: {FAULT_TEXTS[code]}",)
    assert not (tmp_path / "out").exists()


def test_another_version_of_the_package_or_another_base_is_refused(document, sessions, tmp_path):
    asked = []
    grid = grid_of(sessions)

    def older(frame: Frame):
        asked.append(frame)
        return sessions[7].answer(Frame({**frame.header, "fedexlora": "0.0.1"}, frame.parts))

    def other_base(frame: Frame):
        return sessions[8].answer(Frame({**frame.header, "base": "another"}, frame.parts))

    grid.nodes |= {7: older, 8: other_base}
    with pytest.raises(RunError) as caught:
        start(grid, document, tmp_path / "out")
    assert FAULT_TEXTS[NodeFault.RELEASE_DIFFERS] in str(caught.value)
    assert FAULT_TEXTS[NodeFault.BASE_DIFFERS] in str(caught.value)


@pytest.mark.parametrize(
    ("authenticated", "fault"),
    [
        (True, "node 9: the name 'site-south' belongs to another key in this run"),
        (False, "node 9: node 8 is client 'site-south' already"),
    ],
)
def test_a_second_node_of_the_same_name_is_refused(
    document, sessions, tmp_path, authenticated, fault
):
    sessions[9] = session("site-south", document, tmp_path / "twin")
    with pytest.raises(RunError, match=fault):
        start(grid_of(sessions), document, tmp_path / "out", authenticated=authenticated)
    assert not (tmp_path / "out").exists()


def test_a_name_belongs_to_the_key_that_had_it_first_until_somebody_frees_it(
    document, sessions, homes, tmp_path
):
    document["federation"]["rounds"] = 1
    grid = grid_of(sessions)
    grid.keys = {7 + i: name.encode() for i, name in enumerate(CLIENTS)}
    start(grid, document, tmp_path / "out")
    owners = tmp_path / "out" / "clients.jsonl"
    lines = owners.read_text().splitlines(keepends=True)
    assert [json.loads(line)["client"] for line in lines] == list(CLIENTS)
    document["federation"]["rounds"] = 2
    grid.keys[8] = b"another key"
    with pytest.raises(RunError, match="node 8: the name 'site-south' belongs to another key"):
        start(grid, document, tmp_path / "out")
    owners.write_text(lines[0] + lines[2])
    result = start(grid, document, tmp_path / "out")
    assert [c.client for c in result.records[1].clients] == list(CLIENTS)
    assert len(owners.read_text().splitlines()) == 3


def test_a_client_that_is_excluded_is_not_let_in_and_the_run_goes_on_without_it(
    document, sessions, tmp_path
):
    document["federation"]["rounds"] = 1
    start(grid_of(sessions), document, tmp_path / "out")
    document["federation"] |= {"rounds": 3, "exclude": ["site-south"]}
    result = start(grid_of(sessions), document, tmp_path / "out", nodes=2)
    for record in result.records[1:]:
        assert [c.client for c in record.clients] == ["site-north", "site-west"]
        assert (record.registered, record.left_out) == (2, ())
    document["federation"] |= {"exclude": [], "allow": ["site-east", "site-south"], "rounds": 4}
    with pytest.raises(RunError, match="node 7, 9: federation.allow does not name it"):
        start(grid_of(sessions), document, tmp_path / "out")
