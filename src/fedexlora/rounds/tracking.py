"""Rounds in TensorBoard, Weights & Biases or MLflow too, while a run goes on.

accelerate's trackers write them; a run's own record stays what reports are made from. A point is
written at most once: ``tracking.json`` in the run's folder says up to which round each tracker has
been told, before it is. A tracker that fails is let go of, with one note, and the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fedexlora.errors import RecipeError
from fedexlora.exchange.files import replace_bytes
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.untrusted import json_object
from fedexlora.rounds.observer import Observer, Observers, RunInfo
from fedexlora.rounds.record_lines import RecordLines

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from fedexlora.rounds.recipe import Recipe

FOLDER, STATE = "tracking", "tracking.json"
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",),
             "mlflow": ("mlflow",)}  # fmt: skip
_BEFORE = -1
"""The round up to which a new tracker has been told: scores before round 1 are of round 0."""


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        RecipeError: naming each, with the command that installs it.
    """
    wanted = recipe.tracking.trackers
    missing: list[str] = [x for x in wanted if not any(map(find_spec, _PACKAGES[x]))]
    if wanted and find_spec("accelerate") is None:  # a server without a model need not have it
        missing.append("accelerate")
    if missing:
        faults = [
            f"tracking.trackers: {name} is not installed: pip install {name}" for name in missing
        ]
        raise RecipeError("the recipe asks for trackers that are not there", faults)


@contextmanager
def tracked(recipe: Recipe, folder: Path, observer: Observer) -> Iterator[Observer]:
    """An observer that tells the recipe's trackers too, which are closed when the block ends.

    Args:
        recipe: the run's.
        folder: the run's.
        observer: told of everything first, and of trackers that fail.
    """
    if not recipe.tracking.trackers:
        yield observer
        return
    trackers = Trackers(recipe, folder, observer)
    try:
        yield Observers(observer, trackers)
    finally:
        trackers.close()


class Trackers(Observer):
    """Tells trackers of rounds.

    Args:
        recipe: the run's.
        folder: the run's.
        observer: told of a tracker that fails.
    """

    def __init__(self, recipe: Recipe, folder: Path, observer: Observer) -> None:
        self._recipe, self._folder, self._observer = recipe, folder, observer
        self._open: dict[str, GeneralTracker] = {}
        self._state: dict[str, dict[str, Any]] = {}
        self._moved = 0

    def started(self, info: RunInfo) -> None:
        """Open the trackers, and tell them what they have missed."""
        from accelerate import PartialState

        PartialState()  # accelerate's log needs it; training has set it up where there is any
        self._state = _read_state(self._folder / STATE)
        for name in self._recipe.tracking.trackers:
            with self._letting_go(name):
                self._open[name] = self._opened(name)
        self._tell(0, {f"score/{name}": value for name, value in info.initial_metrics.items()})
        for record in RecordLines(self._folder / "rounds.jsonl", info.finished):
            self.finished_round(record)

    def finished_round(self, record: RoundRecord) -> None:
        """Tell all trackers of a round that they do not have."""
        self._moved += record.bytes.up + record.bytes.down
        self._tell(record.round, {**points(record), "bytes/total": float(self._moved)})

    def close(self) -> None:
        """Close the trackers, however the run ended."""
        for name in list(self._open):
            with self._letting_go(name):
                self._open[name].finish()
        self._open.clear()

    def _opened(self, name: str) -> GeneralTracker:
        new = name not in self._state
        entry = self._state.setdefault(name, {"told": _BEFORE, "id": uuid4().hex})
        tracker = _tracker(name, self._recipe.tracking.project, self._folder, entry)
        tracker.start()
        if name == "mlflow":
            entry["id"] = tracker.tracker.info.run_id
        self._write_state()
        if new:
            tracker.store_init_configuration(dict(_settings(self._recipe)))
        return tracker

    def _tell(self, round_: int, values: Mapping[str, float]) -> None:
        for name in list(self._open):
            if self._state[name]["told"] >= round_:
                continue
            with self._letting_go(name):
                self._state[name]["told"] = round_
                self._write_state()
                self._open[name].log(dict(values), step=round_)

    @contextmanager
    def _letting_go(self, name: str) -> Iterator[None]:
        """Do without a tracker from the first time that it fails, and say so once."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - no picture of a run is worth the run
            self._open.pop(name, None)
            self._observer.note(
                f"the run goes on without {name}, which failed: {type(error).__name__}: {error}"
            )

    def _write_state(self) -> None:
        content = json.dumps(self._state, indent=2).encode()
        replace_bytes(self._folder / STATE, content, sync=False)


def points(record: RoundRecord) -> dict[str, float]:
    """What trackers are told of a round, by name; what is no number is left out."""
    certificate = record.certificate
    whole = sum(client.weight for client in record.clients)
    found = {
        **{f"score/{name}": value for name, value in record.metrics.items()},
        "loss/training": sum(c.weight * c.loss for c in record.clients) / (whole or 1.0),
        "certificate/error": certificate.error,
        "certificate/allowed": certificate.allowed,
        "certificate/worst_module": certificate.worst_error,
        "deviation": record.deviation,
        "bytes/up": float(record.bytes.up),
        "bytes/down": float(record.bytes.down),
        "clients/counted": float(len(record.clients)),
        "clients/left_out": float(len(record.left_out)),
        "seconds/round": sum(record.seconds.values()),
    }
    # What a server without a model does not know is None.
    for name, value in (("forward", certificate.forward), ("kept", certificate.kept)):
        if value is not None:
            found[f"certificate/{name}"] = value
    return {name: value for name, value in found.items() if isfinite(value)}


def _tracker(name: str, project: str, folder: Path, entry: Mapping[str, Any]) -> GeneralTracker:
    """One of accelerate's, that goes on with the tracker's own run where there is one."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    place = folder / FOLDER
    if name == "tensorboard":
        return kind(name, logging_dir=place)
    if name == "mlflow":
        known = entry["id"] if entry["told"] > _BEFORE else None
        return kind(project, run_id=known, run_name=folder.name)
    place.mkdir(exist_ok=True)
    mode = os.environ.get("WANDB_MODE", "offline")
    return kind(
        project, id=entry["id"], resume="allow", name=folder.name, dir=str(place), mode=mode
    )


def _settings(recipe: Recipe) -> Iterator[tuple[str, str | int | float]]:
    """The recipe's values by key, as trackers store them."""

    def walk(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str | int | float]]:
        for key, value in table.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")
            else:
                plain = value if isinstance(value, str | int | float) else json.dumps(value)
                yield f"{prefix}{key}", plain

    yield from walk(recipe.model_dump(mode="json", exclude_none=True), "")


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    """By tracker, what it has been told and which run of its own that is; empty if damaged."""
    try:
        found = json_object(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, dict)
        and isinstance(entry.get("told"), int)
        and isinstance(entry.get("id"), str)
    }
