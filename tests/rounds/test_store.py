"""The store of versions: what a round writes, what stays, and what is read of it."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.errors import ResumeError, VersionError
from fedexlora.exchange.history import Holdings
from fedexlora.exchange.state import GlobalState
from fedexlora.rounds.folder import Progress, RunFolder
from fedexlora.rounds.store import SNAPSHOT_ROUNDS
from tests.exchange.test_hostile import record
from tests.exchange.versions import Round, history, same, state, step, wide_state, wide_steps

WINDOW = 4


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def grown(folder: RunFolder, begun: GlobalState, rounds: list[Round], window: int = WINDOW):
    """A run of rounds in which client ``a`` lands every time and ``b`` once; ``c`` is lost."""
    folder.store.path.mkdir(parents=True)
    holdings = Holdings({}, history(window=window))
    records = ()
    folder.save(Progress(begun, (), holdings))
    for made, reached in rounds:
        landed = ["a", "b", "c"] if made.version == 2 else ["a"]
        lost = ["c"] if made.version == 3 else []
        holdings = holdings.after(made, reached, landed, lost)
        records = (*records, record(made.version))
        folder.save(Progress(reached, records, holdings))
    return Progress(reached, records, holdings)


def stored(folder: RunFolder) -> list[str]:
    return sorted(path.stem for path in folder.store.path.iterdir())


def check_same(found: Progress, expected: Progress) -> None:
    assert same(found.state, expected.state)
    assert [r.round for r in found.records] == [r.round for r in expected.records]
    assert found.holdings.versions == expected.holdings.versions
    kept, known = found.holdings.history, expected.holdings.history
    assert {v: s.id for v, s in kept.steps.items()} == {v: s.id for v, s in known.steps.items()}
    assert kept.starts.keys() >= known.starts.keys()
    assert all(same(kept.starts[v], start) for v, start in known.starts.items() if v)


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
    for _, found in made[max(0, rounds - window) :]:
        assert same(folder.store.state(found.version), found)


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
        steps = range(first + 1, rounds + 1)
        assert stored(folder) == sorted(
            [f"snapshot-{v:04d}" for v in snapshots] + [f"step-{v:04d}" for v in steps]
        )
    folder = RunFolder(tmp_path / "long memory")
    grown(folder, begun, wide_steps(33, begun), window=25)
    assert stored(folder)[0] == "snapshot-0000"


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
    assert stored(folder)[-1] == "step-0021"


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


def test_a_line_of_the_record_that_was_cut_off_comes_back_from_the_step(long, tmp_path):
    folder = copied(long[0], tmp_path / "run")
    path = folder.path / "rounds.jsonl"
    whole = path.read_bytes()
    for missing in (1, 9, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-missing])
        found = folder.load(WINDOW)
        assert len(found.records) == 24
        assert len(folder.read_records(99)) == 23
        folder.settle(found)
        assert path.read_bytes() == whole
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
    with pytest.raises(ResumeError, match="expected rounds 1 to 24, found"):
        folder.load(WINDOW)


def test_own_adapters_are_stored_when_they_change_and_read_as_they_were(tmp_path):
    begun, folder = state(0), RunFolder(tmp_path / "run")
    held, made = begun, []
    for i in range(13):
        fresh = {"layer.q": Factors(torch.randn(3, 5), torch.randn(7, 3))}
        own = {**held.own, f"client-{i % 3}": fresh}
        found = held.step(held.adapter, ("A", "B"), {}, held.dense, own)
        held = held.advance([found])
        made.append((found, held))
    reached = grown(folder, begun, made)
    check_same(folder.load(WINDOW), reached)
    assert all(len(found.own) == 1 for found, _ in made)
    assert len(folder.load(WINDOW).state.own) == 3


def test_the_folder_of_an_older_version_is_refused(tmp_path, document):
    from fedexlora.rounds.recipe import parse_recipe

    (tmp_path / "checkpoints").mkdir()
    recipe = parse_recipe(document, "test")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    with pytest.raises(ResumeError, match="a run of an older fedexlora") as caught:
        RunFolder(tmp_path).check_same(recipe)
    assert "start a new run in another folder" in caught.value.faults[0]
