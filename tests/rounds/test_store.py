"""The store of versions: what a round writes, what stays, and what is read of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.errors import ResumeError, VersionError
from fedexlora.exchange.delivery import deliver
from fedexlora.exchange.history import History, Holdings
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step_file import read_step
from fedexlora.exchange.tensors import TensorFile
from fedexlora.rounds import store as store_module
from fedexlora.rounds.folder import Progress, RunFolder
from fedexlora.rounds.store import SNAPSHOT_ROUNDS
from tests.exchange.hostile import parts
from tests.exchange.test_hostile import record
from tests.exchange.test_step_file import live
from tests.exchange.versions import (
    Round,
    same,
    state,
    step,
    step_from,
    stored,
    wide_state,
    wide_steps,
)

WINDOW = 4


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def grown(folder: RunFolder, begun: GlobalState, rounds: list[Round], window: int = WINDOW):
    """A run of rounds in which client ``a`` lands every time and ``b`` once; ``c`` is lost."""
    folder.store.path.mkdir(parents=True)
    holdings = Holdings({}, History(window, folder.store, {0: begun.id}))
    reached = Progress(begun, (), holdings)
    folder.begin(begun, holdings)
    for made in rounds:
        reached = written(folder, reached, made)
        save(folder, reached)
    return reached


def save(folder: RunFolder, reached: Progress) -> None:
    folder.save(reached.state, reached.holdings, reached.records[-1])


def written(folder: RunFolder, before: Progress, made: Round) -> Progress:
    """Where a round leads whose step is finished, but not durable."""
    step, state = made
    landed = ["a", "b", "c"] if step.version == 2 else ["a"]
    lost = ["c"] if step.version == 3 else []
    held = before.holdings.changes(before.state.version, landed, lost)
    sink = folder.store.sink(before.state, ("A", "B"), {c: c for c in state.own}, held)
    found = stored(sink, step, state, held)
    assert found.id == step.id
    records = (*before.records, record(step.version))
    return Progress(state, records, before.holdings.after(found, held))


def files(folder: RunFolder) -> list[str]:
    return sorted(path.stem for path in folder.store.path.iterdir())


def check_same(found: Progress, expected: Progress) -> None:
    assert same(found.state, expected.state)
    assert [r.round for r in found.records] == [r.round for r in expected.records]
    assert found.holdings.versions == expected.holdings.versions
    kept, known = found.holdings.history, expected.holdings.history
    assert kept.ids == known.ids


@pytest.mark.parametrize("rounds", [1, 3, 10, 12, 20, 23, 31])
@pytest.mark.parametrize("window", [0, 4, 12])
def test_what_is_read_is_what_was_reached_to_the_bit(tmp_path, rounds, window):
    begun = state(0)
    made: list[Round] = []
    for _ in range(rounds):
        made.append(step(made[-1][1] if made else begun))
    folder = RunFolder(tmp_path / "run")
    reached = grown(folder, begun, made, window)
    check_same(folder.load(window), reached)
    assert folder.load(window).damaged == {}
    promised = folder.load(window).holdings.history
    for found in [begun, *(found for _, found in made)][max(0, rounds - window) :]:
        assert same(folder.store.state(found.version), found)
        assert same(promised.start(found.version), found.start())
    assert promised.start(rounds - window - 1) is None
    steps = promised.steps(max(0, rounds - window), rounds)
    assert [step.id for step in steps] == [step.id for step, _ in made[max(0, rounds - window) :]]


@pytest.mark.parametrize("best", [0, 3, 10, 17, 20, 33])
def test_what_leads_to_the_best_version_outlives_what_is_promised(tmp_path, best):
    begun = state(0)
    made: list[Round] = []
    for _ in range(35):
        made.append(step(made[-1][1] if made else begun))
    folder = RunFolder(tmp_path / "run")
    folder.store.path.mkdir(parents=True)
    reached = Progress(begun, (), Holdings({}, History(WINDOW, folder.store, {0: begun.id})))
    folder.begin(begun, reached.holdings)
    for each in made:
        reached = written(folder, reached, each)
        seen = min(best, reached.state.version)
        folder.save(reached.state, reached.holdings, reached.records[-1], seen)
    assert same(folder.store.state(best), [begun, *(found for _, found in made)][best])
    assert len(files(folder)) <= 35
    check_same(folder.load(WINDOW), reached)
    folder.settle(reached, best)
    assert same(folder.store.state(best), [begun, *(found for _, found in made)][best])
    folder.settle(reached)
    if best < 20:
        with pytest.raises(VersionError):
            folder.store.state(best)


def test_a_round_writes_its_step_and_not_the_total(tmp_path):
    begun = wide_state()
    folder = RunFolder(tmp_path / "run")
    grown(folder, begun, wide_steps(30, begun))
    sizes = [folder.store.step_file(v).stat().st_size for v in (21, 25, 29)]
    assert max(sizes) - min(sizes) < 64, "it does not grow"
    tensors = 2 * 2 * (64 + 48) * 4
    assert max(sizes) < tensors + 4096


def test_steps_that_are_no_longer_promised_are_removed_once_a_snapshot_stands_for_them(tmp_path):
    begun = wide_state()
    for rounds, first in ((9, 0), (10, 0), (14, 0), (20, 10), (33, 20)):
        folder = RunFolder(tmp_path / str(rounds))
        grown(folder, begun, wide_steps(rounds, begun))
        snapshots = range(first, rounds + 1, SNAPSHOT_ROUNDS)
        steps = range(max(first, 1), rounds + 1)
        assert files(folder) == sorted(
            [f"snapshot-{v:04d}" for v in snapshots] + [f"step-{v:04d}" for v in steps]
        )
    folder = RunFolder(tmp_path / "long memory")
    grown(folder, begun, wide_steps(33, begun), window=25)
    assert files(folder)[0] == "snapshot-0000"


def copied(folder: RunFolder, path) -> RunFolder:
    shutil.copytree(folder.path, path)
    return RunFolder(path)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    torch.manual_seed(0)
    begun = wide_state()
    made = wide_steps(24, begun)
    folder = RunFolder(tmp_path_factory.mktemp("long") / "run")
    return folder, made, grown(folder, begun, made)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_a_last_step_that_is_cut_off_is_passed_over_and_named(long, tmp_path):
    folder, made = copied(long[0], tmp_path / "run"), long[1]
    path = folder.store.step_file(24)
    cut(path)
    found = folder.load(WINDOW)
    assert same(found.state, made[22][1])
    assert [*found.damaged] == [path]
    assert "step-0024.safetensors is damaged" in found.damaged[path]
    assert len(found.records) == 23
    folder.settle(found)
    assert not path.exists()
    assert len((folder.path / "rounds.jsonl").read_text().splitlines()) == 23
    assert not folder.load(WINDOW).damaged


def test_what_follows_a_damaged_step_is_passed_over_with_it(long, tmp_path):
    folder, made = copied(long[0], tmp_path / "run"), long[1]
    cut(folder.store.step_file(22))
    found = folder.load(WINDOW)
    assert same(found.state, made[20][1])
    assert [path.stem for path in found.damaged] == ["step-0022", "step-0023", "step-0024"]
    folder.settle(found)
    assert files(folder)[-1] == "step-0021"


def test_a_missing_step_is_a_gap(long, tmp_path):
    folder, made = copied(long[0], tmp_path / "run"), long[1]
    folder.store.step_file(22).unlink()
    found = folder.load(WINDOW)
    assert same(found.state, made[20][1])
    (said, after) = found.damaged.values()
    assert "step-0023.safetensors is damaged: steps lead from version 22 to 23" in said
    assert "step-0024.safetensors follows a step that is damaged" in after


def test_a_damaged_snapshot_is_named_and_the_one_before_stands_for_it(long, tmp_path):
    folder, reached = copied(long[0], tmp_path / "run"), long[2]
    newest = folder.store.snapshot_file(20)
    cut(newest)
    found = folder.load(WINDOW)
    check_same(found, reached)
    assert [*found.damaged] == [newest]
    folder.settle(found)
    assert not newest.exists()
    check_same(folder.load(WINDOW), reached)


def test_without_a_snapshot_nothing_can_be_read(long, tmp_path):
    folder = copied(long[0], tmp_path / "run")
    for version in (10, 20):
        cut(folder.store.snapshot_file(version))
    with pytest.raises(ResumeError, match="no version can be read") as caught:
        folder.load(WINDOW)
    assert len(caught.value.faults) == 2
    for version in (10, 20):
        folder.store.snapshot_file(version).unlink()
    with pytest.raises(ResumeError, match="no version can be read") as caught:
        folder.load(WINDOW)
    assert "there is no snapshot" in caught.value.faults[0]
    with pytest.raises(VersionError, match="has no version 24"):
        folder.store.state(24)


def test_a_snapshot_that_a_kill_prevented_is_made_when_the_run_goes_on(long, tmp_path):
    begun = wide_state()
    folder = RunFolder(tmp_path / "run")
    grown(folder, begun, wide_steps(10, begun))
    whole = folder.store.snapshot_file(10).read_bytes()
    folder.store.snapshot_file(10).unlink()
    folder.settle(folder.load(WINDOW))
    found, expected = folder.store.snapshot_file(10).read_bytes(), whole
    assert len(found) == len(expected)
    assert found[-10_000:] == expected[-10_000:]


def test_a_version_whose_record_is_missing_is_refused(long, tmp_path):
    folder = copied(long[0], tmp_path / "run")
    path = folder.path / "rounds.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    spoilt = (whole[:-1], whole[:-9], b"".join(lines[:-1]), b"".join(lines[:-2]))
    for content in (*spoilt, b"".join([*lines[:-1], lines[0]]), b""):
        path.write_bytes(content)
        with pytest.raises(ResumeError, match="expected rounds 1 to 24, found") as caught:
            folder.load(WINDOW)
        assert "the last version in" in caught.value.faults[0]
    path.write_bytes(whole + lines[-1][:40])
    assert len(folder.load(WINDOW).records) == 24


def test_a_record_before_whose_step_has_its_name_is_one_of_no_round(long, tmp_path, monkeypatch):
    """The kill comes between the two: the round is run again, to the same bits."""
    folder, made = copied(long[0], tmp_path / "run"), wide_steps(1, long[1][-1][1])
    before = folder.load(WINDOW)
    after = written(folder, before, made[0])
    monkeypatch.setattr(folder.store, "commit", lambda version: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(folder, after)
    monkeypatch.undo()
    assert len(folder.read_records(99)) == 25
    again = RunFolder(folder.path)
    check_same(again.load(WINDOW), before)
    again.settle(again.load(WINDOW))
    assert not list(folder.store.path.glob(".*")), "the step that was begun is gone"
    assert len(folder.read_records(99)) == 24
    save(again, written(again, again.load(WINDOW), made[0]))
    check_same(again.load(WINDOW), after)


def test_a_step_of_another_round_is_named(long, tmp_path):
    folder, made = copied(long[0], tmp_path / "run"), long[1]
    shutil.copy(folder.store.step_file(23), folder.store.step_file(24))
    found = folder.load(WINDOW)
    assert same(found.state, made[22][1])
    (said,) = found.damaged.values()
    assert "step-0024.safetensors is damaged: it is one of version 23" in said
    shutil.copy(folder.store.snapshot_file(10), folder.store.snapshot_file(20))
    found = folder.load(WINDOW)
    assert "snapshot-0020.safetensors is damaged: it is one of version 10" in str(found.damaged)


@pytest.mark.parametrize(("file", "part"), [("step-0023", "remainder"), ("snapshot-0020", "total")])
def test_one_changed_bit_is_found_and_its_part_is_named(long, tmp_path, file, part):
    folder = copied(long[0], tmp_path / "run")
    path = folder.store.path / f"{file}.safetensors"
    header, body = parts(path.read_bytes())
    name = next(name for name in header if name.startswith(("piece", "total")))
    content = bytearray(path.read_bytes())
    content[len(content) - len(body) + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    said = folder.load(WINDOW).damaged[path]
    assert f"{path} is damaged" in said
    assert f"{part}: expected" in said


def test_a_promised_step_that_is_damaged_ends_the_promise(long, tmp_path):
    """Clients of older versions get a snapshot."""
    folder = copied(long[0], tmp_path / "run")
    assert min(folder.load(12).holdings.history.ids) == 12
    cut(folder.store.step_file(16))
    found = folder.load(12)
    assert not found.damaged
    assert min(found.holdings.history.ids) == 20, "from the snapshot on, all is whole"


def test_a_step_that_is_gone_when_it_is_sent_stops_the_run_by_name(long, tmp_path):
    folder = copied(long[0], tmp_path / "run")
    known = folder.load(WINDOW)
    shutil.copy(folder.store.step_file(22), folder.store.step_file(23))
    with pytest.raises(VersionError, match="step 23 of the store is not the one"):
        deliver(known.holdings.history, known.state, 21)
    folder.store.step_file(23).unlink()
    with pytest.raises(VersionError, match="step-0023.safetensors is damaged: .*No such file"):
        deliver(known.holdings.history, known.state, 21)
    assert deliver(known.holdings.history, known.state, 23).announced.snapshot is None


def test_what_is_held_does_not_grow_with_rounds(tmp_path):
    begun, folder = wide_state(), RunFolder(tmp_path / "run")
    reached = grown(folder, begun, wide_steps(1, begun), 5)
    held = []
    for i in range(200):
        before = reached.state
        step, after = wide_steps(1, replace(before, total=begun.total))[0]
        reached = replace(written(folder, reached, (step, after)), records=())
        save(folder, replace(reached, records=(record(step.version),)))
        del before, step, after
        if i % 60 == 19:
            held.append((live(), len(reached.holdings.history.ids), len(files(folder))))
    numbers, promised, stored_files = zip(*held, strict=True)
    assert len(set(numbers)) == 1, "numbers in tensors"
    assert set(promised) == {6}
    assert max(stored_files) < 35


def test_own_adapters_are_stored_when_they_change_and_read_as_they_were(tmp_path):
    begun, folder = state(0), RunFolder(tmp_path / "run")
    held, made = begun, []
    for i in range(13):
        fresh = {"layer.q": Factors(torch.randn(3, 5), torch.randn(7, 3))}
        own = {**held.own, f"client-{i % 3}": fresh}
        found = step_from(held, held.adapter, ("A", "B"), {}, held.dense, own)
        held = held.advance([found])
        made.append((found, held))
    reached = grown(folder, begun, made)
    check_same(folder.load(WINDOW), reached)
    assert all(len(found.own) == 1 for found, _ in made)
    assert len(folder.load(WINDOW).state.own) == 3


def test_an_adapter_that_clients_share_is_held_and_stored_once(tmp_path):
    """As those of equal ranks and scalings; one that changes alone is the client's own then."""
    begun, folder = state(0), RunFolder(tmp_path / "run")
    held, made = begun, []
    for i in range(13):
        one, other = (
            {"layer.q": Factors(torch.randn(rank, 5), torch.randn(7, rank))} for rank in (3, 1)
        )
        own = dict.fromkeys(("a", "c", "d"), one) | {"b": other}
        if i == 12:
            own = {**held.own, "c": one}
        found = step_from(held, held.adapter, ("A", "B"), {}, held.dense, own)
        held = held.advance([found])
        made.append((found, held))
        assert held.own["a"] is held.own["d"]
    assert held.own["c"] is not held.own["a"]
    reached = grown(folder, begun, made)
    assert len(read_step(folder.store.step_file(12)).step.own) == 2
    assert len(read_step(folder.store.step_file(13)).step.own) == 1
    check_same(folder.load(WINDOW), reached)
    for version, count in ((10, 2), (12, 2), (13, 3)):
        for found in (folder.store.state(version), folder.store.start(version)):
            assert len({id(adapter) for adapter in found.own.values()}) == count
            assert found.own_digests == made[version - 1][1].own_digests
    names = TensorFile.open(folder.store.snapshot_file(10)).tensors
    assert {name.rpartition("/")[2] for name in names if name.startswith("own.")} == {"a", "b"}


def test_the_folder_of_an_older_version_is_refused(tmp_path, document):
    from fedexlora.rounds.recipe import parse_recipe

    (tmp_path / "checkpoints").mkdir()
    recipe = parse_recipe(document, "test")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    with pytest.raises(ResumeError, match="a run of an older fedexlora") as caught:
        RunFolder(tmp_path).check_same(recipe)
    assert "start a new run in another folder" in caught.value.faults[0]


def test_a_disk_that_cannot_be_read_is_no_damage(long, tmp_path, monkeypatch):
    folder = copied(long[0], tmp_path / "run")
    before = files(folder)

    def failing(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_module, "read_step", failing)
    with pytest.raises(ResumeError, match="versions cannot be read: .*Input/output error"):
        folder.load(WINDOW)
    monkeypatch.undo()
    assert files(folder) == before
    assert folder.load(WINDOW).state.version == 24


def test_copies_that_others_make_are_passed_over(long, tmp_path):
    folder = copied(long[0], tmp_path / "run")
    version = folder.load(WINDOW).state.version
    for name in ("step-0001-conflict-2024", "step-00012", "snapshot-0000 (1)", "step-x"):
        (folder.store.path / f"{name}.safetensors").write_bytes(b"x")
    found = folder.load(WINDOW)
    assert found.state.version == version
    folder.settle(found)
    assert not found.damaged
