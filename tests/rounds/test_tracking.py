"""Trackers beside a run: what they are told, and that they never stop it."""

from __future__ import annotations

import json
from importlib.util import find_spec

import accelerate.tracking
import pytest

from fedexlora.errors import RecipeError
from fedexlora.rounds import tracking
from fedexlora.rounds.observer import Observer, Observers
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, what: str) -> None:
        self.notes.append(what)


class FakeTracker:
    """What accelerate's trackers offer; all of them share one list of points."""

    points: list[tuple[int, dict]] = []  # noqa: RUF012 - emptied by the fixture
    opened: list[tuple] = []  # noqa: RUF012
    settings: list[dict] = []  # noqa: RUF012
    fail_at: int | None = None

    def __init__(self, *args, **kwargs) -> None:
        self.opened.append((args, kwargs))

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict) -> None:
        self.settings.append(values)

    def log(self, values: dict, step: int) -> None:
        if step == self.fail_at:
            raise OSError("the tracker's disk is full")
        self.points.append((step, values))

    def finish(self) -> None:
        self.opened.append("closed")


@pytest.fixture
def fake(monkeypatch) -> type[FakeTracker]:
    monkeypatch.setattr(FakeTracker, "points", [])
    monkeypatch.setattr(FakeTracker, "opened", [])
    monkeypatch.setattr(FakeTracker, "settings", [])
    monkeypatch.setattr(FakeTracker, "fail_at", None)
    known = {**accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb": FakeTracker}
    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", known)
    monkeypatch.setattr(tracking, "find_spec", lambda name: name in ("wandb", "accelerate") or None)
    return FakeTracker


@pytest.fixture
def tracked_recipe(document):
    document["tracking"] = {"trackers": ["wandb"], "project": "hospitals"}
    document["federation"]["rounds"] = 2

    def recipe(rounds: int = 2, trackers=("wandb",)):
        document["federation"]["rounds"] = rounds
        document["tracking"]["trackers"] = list(trackers)
        return parse_recipe(document, "tracked")

    return recipe


def test_every_round_is_told_once_also_over_a_resumed_run(fake, tracked_recipe, tmp_path):
    out = tmp_path / "run"
    run(tracked_recipe(2), out)
    assert [step for step, _ in fake.points] == [0, 1, 2]
    (args, first), closed = fake.opened[0], fake.opened[-1]
    assert args == ("hospitals",)
    assert first["mode"] == "offline"
    assert closed == "closed"
    run(tracked_recipe(3), out, resume=True)
    assert [step for step, _ in fake.points] == [0, 1, 2, 3]
    assert fake.opened[2][1]["id"] == first["id"], "the same run of the tracker goes on"
    assert len(fake.settings) == 1
    assert fake.settings[0]["federation.seed"] == 4
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    last, record = fake.points[-1][1], records[-1]
    assert last["score/accuracy"] == record["metrics"]["accuracy"]
    assert last["certificate/error"] == record["certificate"]["error"]
    assert last["bytes/up"] == record["bytes"]["up"]
    assert last["bytes/total"] == sum(r["bytes"]["up"] + r["bytes"]["down"] for r in records)
    weighed = sum(c["weight"] * c["loss"] for c in record["clients"])
    assert last["loss/training"] == pytest.approx(weighed, rel=1e-12)


def test_a_tracker_that_is_added_later_is_told_what_it_has_missed(fake, tracked_recipe, tmp_path):
    run(tracked_recipe(1, trackers=()), tmp_path / "run")
    assert not fake.points
    run(tracked_recipe(2), tmp_path / "run", resume=True)
    assert [step for step, _ in fake.points] == [0, 1, 2]


def test_a_tracker_that_fails_is_let_go_of_and_named_once(fake, tracked_recipe, tmp_path):
    fake.fail_at = 1
    notes = Notes()
    result = run(tracked_recipe(2), tmp_path / "run", observer=notes)
    assert len(result.records) == 2
    said = [note for note in notes.notes if "wandb" in note]
    assert said == [
        "the run goes on without wandb, which failed: OSError: the tracker's disk is full"
    ]
    assert [step for step, _ in fake.points] == [0]


def test_a_missing_package_is_refused_before_anything_is_written(
    monkeypatch, tracked_recipe, tmp_path
):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(RecipeError) as error:
        run(tracked_recipe(trackers=("mlflow", "tensorboard")), tmp_path / "run")
    assert error.value.faults == (
        "tracking.trackers: mlflow is not installed: pip install mlflow",
        "tracking.trackers: tensorboard is not installed: pip install tensorboard",
        "tracking.trackers: accelerate is not installed: pip install accelerate",
    )
    assert not (tmp_path / "run").exists()


def test_every_observer_is_told_of_everything():
    told = []

    class Loud(Observer):
        def __getattribute__(self, name):
            return lambda *values: told.append((name, values))

    names = [name for name in vars(Observer) if not name.startswith("_")]
    both = Observers(Loud(), Loud())
    for name in names:
        getattr(both, name)("a value")
    assert told == [(name, ("a value",)) for name in names for _ in range(2)]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_reads_what_a_run_wrote(tracked_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    run(tracked_recipe(1, trackers=("tensorboard",)), out)
    run(tracked_recipe(2, trackers=("tensorboard",)), out, resume=True)
    events = EventAccumulator(str(out / "tracking" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("score/accuracy")] == [0, 1, 2]
    assert [event.step for event in events.Scalars("certificate/error")] == [1, 2]
