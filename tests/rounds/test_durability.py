"""A run that is killed, moved or out of disk at any moment ends with the same bits."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fedexlora.errors import DivergenceError, InputError, RunError
from fedexlora.exchange.delivery import Delivery
from fedexlora.exchange.history import History, Holdings
from fedexlora.exchange.state import GlobalState
from fedexlora.local.clients import LocalClients
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.folder import Progress, RunFolder
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.participation import Participation
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.prepared import Prepared
from fedexlora.rounds.recipe import Recipe, parse_recipe
from fedexlora.rounds.round import run_round
from fedexlora.rounds.run import run
from fedexlora.rounds.transport import Reply
from tests.cli.invoke import fedexlora
from tests.exchange.hostile import parts
from tests.models import adapted
from tests.rounds.conftest import files, recipe_document
from tests.rounds.forked import FullDisk, Moments, count, forked, quick
from tests.rounds.scripted import OTHER, Scripted, federation, random_update

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it forks")


Made = tuple[Prepared, LocalClients]


def parsed(bert: str, data_folder: Path, **changes: object) -> Recipe:
    document = recipe_document(bert, data_folder)
    document["federation"] |= {"rounds": 2, "history": 1}
    for table, values in changes.items():
        document[table] = values if table == "partition" else document[table] | values
    return parse_recipe(document, "test")


@pytest.fixture(scope="module")
def small(bert, data_folder) -> Made:
    """Two rounds of three clients; children of this process run it."""
    return prepare(parsed(bert, data_folder), Observer())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, bit for bit, but for the order in which safetensors writes its metadata."""
    found = files(folder)
    for name in found:
        if name.endswith(".safetensors"):
            header, body = parts(found[name])
            found[name] = json.dumps(header, sort_keys=True).encode() + body
    return found


def start(
    made: Made, out: Path, moments: Moments, failing: float = 0.0, keep: bool = False
) -> None:
    """Run, or resume, in this process; for a child."""
    quick(made, failing)
    moments.watch()
    run(made[0].recipe, out, resume=True, keep_updates=keep)


def whole_of(made: Made, folder: Path, moments: Moments) -> int:
    """Run undisturbed in ``folder / "whole"``; returns how many moments there were."""
    return count(lambda m: start(made, folder / "whole", m), moments, folder)


def resumes_to_the_same(made: Made, out: Path, wanted: dict[str, bytes]) -> bool:
    """Whether a resumed run leaves the files that an undisturbed one does, bit for bit."""
    return forked(lambda: start(made, out, Moments())) == 0 and contents(out) == wanted


@pytest.mark.exactness
def test_a_kill_at_any_write_or_step_loses_nothing(small, tmp_path):
    total = whole_of(small, tmp_path, Moments())
    wanted = contents(tmp_path / "whole")
    assert total > 50
    failed = []
    for moment in range(1, total + 1):
        out = tmp_path / f"killed-{moment}"
        ended = forked(lambda m=moment, o=out: start(small, o, Moments(m)))
        assert ended == -signal.SIGKILL
        if not resumes_to_the_same(small, out, wanted):
            failed.append(moment)
        shutil.rmtree(out, ignore_errors=True)
    assert not failed


def interrupted(work, out: Path, total: int, kills: int, seed: int) -> None:
    """Kill ``work(out, moments)`` at moments drawn at random; at last let it end."""
    draw = random.Random(seed)
    for _ in range(kills):
        moment = draw.randint(1, total // (kills + 1))
        assert forked(lambda m=moment: work(out, Moments(m))) == -signal.SIGKILL
    assert forked(lambda: work(out, Moments())) == 0


@pytest.mark.exactness
def test_a_sampled_run_with_failing_clients_survives_ten_kills(bert, data_folder, tmp_path):
    """Clients hold versions of different age; what they sent is kept, and is the same, too."""
    recipe = parsed(
        bert,
        data_folder,
        partition={"kind": "iid", "clients": 9},
        federation={"clients_per_round": 4, "rounds": 8, "history": 2, "seed": 6},
    )
    made = prepare(recipe, Observer())

    def work(out: Path, moments: Moments) -> None:
        start(made, out, moments, failing=0.3, keep=True)

    total = count(partial(work, tmp_path / "whole"), Moments(), tmp_path)
    interrupted(work, tmp_path / "killed", total, 10, 1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    records = RunFolder(tmp_path / "whole").load().records
    assert sum(len(record.left_out) for record in records) >= 5
    assert all(record.certificate.held for record in records)


CLIENTS = tuple(f"client-{i:02d}" for i in range(50))
WAYS = ("raises", "silent", "nan", "cut off", "old version", "wiped", "another history")


class Faulty(Scripted):
    """What happens to a client in a round is a function of the two; its training is noise."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__(self.reply, CLIENTS)
        self._model = model
        self._round = 0

    def fate(self, client: str) -> str:
        draw = random.Random(f"{self._round} {client}")
        return draw.choice(WAYS) if draw.random() < 0.2 else "good"

    def ask(self, round_: int, client: str, delivery: Delivery) -> None:
        held, way = self.held.get(client), self.fate(client)
        if way == "wiped":
            self.held.pop(client, None)
        elif way == "another history" and held is not None:
            self.held[client] = replace(held, id=OTHER)
        super().ask(round_, client, delivery)

    def reply(self, round_: int, client: str, held: GlobalState) -> list[Reply]:
        way = self.fate(client)
        update = random_update(self._model, round_, client, num_examples=1 + len(client) % 7)
        if way == "raises":
            return [Reply(client, round_, failure="OutOfMemoryError")]
        if way == "nan":
            next(iter(update.tensors.values()))[0, 0] = float("nan")
        if way == "old version":
            update = random_update(self._model, round_, client, version=OTHER)
        message = update.encode()
        if way == "cut off":
            message = message[:-9]
        return [] if way == "silent" else [Reply(client, round_, message)]


def play(model: AdaptedModel, out: Path, moments: Moments) -> None:
    """Thirty rounds, or what is left of them; for a child."""
    quick(None)
    moments.watch()
    transport = Faulty(model)
    rule = Participation(clients_per_round=5)
    parts, state = federation(model, "fedex", transport=transport, participation=rule)
    folder = RunFolder(out)
    folder.store.path.mkdir(parents=True, exist_ok=True)
    if (progress := folder.load(4)) is None:
        progress = Progress(state, (), Holdings({}, History(4, folder.store, {0: state.id})))
        folder.begin(state, progress.holdings)
    else:
        folder.settle(progress)
    state, holdings = progress.state, progress.holdings
    known = [v for v in set(holdings.versions.values()) if v in holdings.history.ids]
    versions = {v: folder.store.state(v) for v in known}
    transport.held = {c: versions[v] for c, v in holdings.versions.items() if v in versions}
    model.apply(state)
    while state.version < 30:
        transport._round = state.version + 1
        state, holdings, record = run_round(parts, state, holdings)
        assert record.certificate.held
        folder.save(state, holdings, record)


@pytest.mark.exactness
def test_thirty_rounds_of_fifty_failing_clients_survive_ten_kills(tmp_path):
    model = AdaptedModel(adapted("llama-rslora"))
    total = count(lambda m: play(model, tmp_path / "whole", m), Moments(), tmp_path)
    interrupted(partial(play, model), tmp_path / "killed", total, 10, 2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    records = RunFolder(tmp_path / "whole").load().records
    assert len(records) == 30
    assert sum(len(record.left_out) for record in records) >= 15


def out_of_space(made: Made, out: Path, disk: Moments) -> None:
    """Run on a disk that is full sooner or later; for a child."""
    quick(made)
    disk.watch()
    with pytest.raises((RunError, InputError), match="No space left on device") as caught:
        run(made[0].recipe, out, resume=True)
    assert str(out) in str(caught.value)
    assert not list(out.rglob(".*.tmp"))


@pytest.mark.exactness
def test_a_disk_that_is_full_at_any_write_stops_the_run_by_name(small, tmp_path):
    total = whole_of(small, tmp_path, FullDisk())
    wanted = contents(tmp_path / "whole")
    assert total >= 8
    for write in range(1, total + 1):
        out = tmp_path / f"full-{write}"
        assert forked(lambda w=write, o=out: out_of_space(small, o, FullDisk(w))) == 0
        before = RunFolder(out).load() if (out / "run.json").exists() else None
        assert before is None or not before.damaged
        assert resumes_to_the_same(small, out, wanted)


def test_a_full_disk_ends_the_command_with_code_1_and_no_traceback(small, tmp_path, bert):
    path = tmp_path / "recipe.toml"
    path.write_text(small[0].recipe.to_toml())

    def command() -> None:
        quick(small)
        FullDisk(6).watch()
        done = fedexlora("run", path, "--out", tmp_path / "run")
        assert done.returncode == 1
        assert "spool cannot be written: No space left" in done.stderr
        assert "Traceback" not in done.stderr

    assert forked(command) == 0


def test_a_disk_that_is_really_full_leaves_a_run_that_can_be_resumed(small, tmp_path):
    assert whole_of(small, tmp_path, Moments())
    wanted = contents(tmp_path / "whole")
    size = sum(map(len, wanted.values()))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "none", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        assert forked(lambda: out_of_space(small, disk / "run", Moments())) == 0
        assert RunFolder(disk / "run").load() is not None
        shutil.copytree(disk / "run", tmp_path / "moved")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert resumes_to_the_same(small, tmp_path / "moved", wanted)


def test_a_run_resumes_on_another_machine_to_the_same_bits(small, tmp_path):
    total = whole_of(small, tmp_path, Moments())
    here, there = tmp_path / "here", tmp_path / "elsewhere" / "renamed"
    killed = forked(lambda: start(small, here, Moments(total * 3 // 4)))
    assert killed == -signal.SIGKILL
    shutil.copytree(here, there)
    shutil.rmtree(here)
    header = json.loads((there / "run.json").read_text())
    header["machine"] |= {"python": "3.14.0", "processor": "riscv64", "cores": 512}
    (there / "run.json").write_text(json.dumps(header, indent=2))
    wanted = contents(tmp_path / "whole") | {"run.json": (there / "run.json").read_bytes()}
    assert resumes_to_the_same(small, there, wanted)


def test_a_score_that_is_no_number_stops_the_run_and_its_last_version_goes_on(small, tmp_path):
    out = tmp_path / "run"

    def scored(*losses: float) -> None:
        found = iter(losses)
        quick(small)
        Prepared.evaluate = lambda self, observer: {"loss": next(found), "accuracy": 0.5}
        run(small[0].recipe, out, resume=True)

    def stops() -> None:
        with pytest.raises(DivergenceError, match="round 2: the global model has no score"):
            scored(1.0, 1.0, float("nan"))

    assert forked(stops) == 0
    assert [record.round for record in RunFolder(out).load().records] == [1]
    assert not (out / "adapter").exists()
    assert forked(lambda: scored(*[1.0] * 9)) == 0
    for line in (out / "rounds.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
