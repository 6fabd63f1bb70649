"""What is recorded of one run, read from its folder; nothing else of the folder is looked at."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fedexlora.errors import InputError
from fedexlora.exchange.module_names import split_name
from fedexlora.exchange.records import FinishRecord, ModuleRecord, RoundRecord
from fedexlora.exchange.scores import scores_by_version
from fedexlora.exchange.untrusted import json_object, short
from fedexlora.report.header import Header

Numbers = NDArray[np.float64]
_FIGURES = (
    "error",
    "allowed",
    "forward",
    "kept",
    "deviation",
    "truncated",
    "mean_product",
    "remainder_norm",
    "bf16_loss",
)


@dataclass(frozen=True)
class Modules:
    """The figures of every adapted module in every round: ``(rounds, modules)``, float64.

    What a record lacks is not a number.
    """

    names: tuple[str, ...]
    figures: Mapping[str, Numbers]
    ranks: Numbers
    """Of the cumulative remainder, as it is held; not a number where it is dense."""
    weights: Numbers
    """``(modules,)``: norms of the frozen weights."""

    @cached_property
    def places(self) -> tuple[tuple[str, str], ...]:
        """Layer and projection by module."""
        return tuple(map(split_name, self.names))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """In the model's order."""
        return tuple(dict.fromkeys(layer for layer, _ in self.places))

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """In the model's order."""
        return tuple(dict.fromkeys(projection for _, projection in self.places))

    def residual(self) -> Numbers:
        """|R| of every round: what averaging the factors loses."""
        return self.figures["deviation"] * self.figures["mean_product"]


@dataclass(frozen=True)
class RunRecords:
    """One run."""

    folder: Path
    recipe: Mapping[str, Any]
    """``recipe.toml`` as a TOML parser gives it."""
    recipe_text: str
    header: Header | None
    """None if the run stopped before it was written."""
    rounds: tuple[RoundRecord, ...]
    """Without their modules, which are in ``modules``."""
    modules: Modules
    cut: bool
    """Whether the last line of the records is half written."""
    finish: FinishRecord | None = None
    """What clients say of the last version, where they score."""
    stopped: bool = False
    """Whether the run ended early because its recipe says so."""

    @property
    def planned(self) -> int | None:
        """How many rounds the recipe asks for."""
        found = table(self.recipe, "federation").get("rounds")
        return found if isinstance(found, int) else None

    @property
    def method(self) -> str:
        """The method's name: that of the records, or else of the recipe."""
        if self.rounds:
            return self.rounds[0].method
        named = table(self.recipe, "method").get("name")
        return str(named or table(self.recipe, "federation").get("method", "?"))

    @property
    def seed(self) -> int | None:
        """The federation's."""
        found = table(self.recipe, "federation").get("seed")
        return found if isinstance(found, int) else None

    @property
    def state(self) -> str:
        """How far it is, for people."""
        done, planned = len(self.rounds), self.planned
        said = f"{done} of {planned} rounds" if planned else f"{done} rounds"
        if not done:
            said = "no finished round"
        if self.stopped:
            said += ", ended early as its recipe says"
        if self.cut:
            said += "; the record of the round after is cut off"
        return said

    @property
    def whole(self) -> bool:
        """Whether every round of the recipe is there."""
        ended = self.stopped or len(self.rounds) == self.planned
        return ended and not self.cut and bool(self.rounds)

    @cached_property
    def scored(self) -> Mapping[int, Mapping[str, float]]:
        """Scores by version, 0 before round 1: the server's, or else those of the clients."""
        initial = {} if self.header is None else self.header.initial_metrics
        return scores_by_version(initial, self.rounds, self.finish)


def table(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of a recipe; empty if there is none."""
    found = recipe.get(name)
    return found if isinstance(found, Mapping) else {}


def read_run(folder: Path) -> RunRecords:
    """Read what is recorded of a run.

    Args:
        folder: the run's.

    Raises:
        InputError: if it is no run's folder, or a file cannot be read; lists all faults. A run
            that has not finished, and a last line that was cut off, are no faults.
    """
    if not (folder / "recipe.toml").is_file():
        raise InputError(f"{folder}: no run's folder", ["recipe.toml: missing"])
    faults: list[str] = []
    text, recipe = _recipe(folder / "recipe.toml", faults)
    header = _header(folder / "run.json", faults)
    reader = _Rounds()
    reader.read(folder / "rounds.jsonl", faults)
    finish = _finish(folder / "finish.json", faults)
    if faults:
        raise InputError(f"{folder}: the run's records cannot be read", faults)
    modules = reader.modules(header.weights if header else {})
    return RunRecords(
        folder,
        recipe,
        text,
        header,
        tuple(reader.rounds),
        modules,
        reader.cut,
        finish,
        _stopped(folder / "adapter.json", len(reader.rounds)),
    )


def _recipe(path: Path, faults: list[str]) -> tuple[str, Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (OSError, ValueError) as error:
        faults.append(f"{path.name}: {error}")
        return "", {}


def _header(path: Path, faults: list[str]) -> Header | None:
    if not path.exists():
        return None
    try:
        return Header.model_validate(json_object(path.read_bytes()))
    except ValidationError as error:
        faults += [f"{path.name}: {fault}" for fault in _described(error)]
    except (OSError, ValueError) as error:
        faults.append(f"{path.name}: {error}")
    return None


def _finish(path: Path, faults: list[str]) -> FinishRecord | None:
    if not path.exists():
        return None
    try:
        return FinishRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults += [f"{path.name}: {fault}" for fault in _described(error)]
    except OSError as error:
        faults.append(f"{path.name}: {error.strerror}")
    return None


def _stopped(path: Path, version: int) -> bool:
    """Whether a run that ends with a version says that it ended early."""
    try:
        said = json_object(path.read_bytes())
    except (OSError, ValueError):
        return False
    return said.get("stopped") is True and said.get("version") == version


class _Rounds:
    """Reads records line by line; of the modules it keeps numbers alone."""

    def __init__(self) -> None:
        self.rounds: list[RoundRecord] = []
        self.cut = False
        self._names: tuple[str, ...] = ()
        self._rows: list[list[list[float]]] = []
        self._ranks: list[list[float]] = []

    def read(self, path: Path, faults: list[str]) -> None:
        """Read all lines; what is wrong with one is added to the faults."""
        if not path.exists():
            return
        try:
            with path.open("rb") as file:
                for place, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        self.cut = True
                        return
                    if fault := self._fault(line):
                        faults.append(f"{path.name}, line {place}: {fault}")
                        return
        except OSError as error:
            faults.append(f"{path.name}: {error.strerror}")

    def modules(self, weights: Mapping[str, float]) -> Modules:
        """The modules' figures of all rounds."""
        shape = (len(self._rows), len(self._names), len(_FIGURES))
        figures = np.array(self._rows, dtype=np.float64).reshape(shape)
        return Modules(
            self._names,
            {name: figures[:, :, i] for i, name in enumerate(_FIGURES)},
            np.array(self._ranks, dtype=np.float64).reshape(shape[:2]),
            np.array([weights.get(name, np.nan) for name in self._names], dtype=np.float64),
        )

    def _fault(self, line: bytes) -> str | None:
        """Take a line in, or say what is wrong with it."""
        try:
            record = RoundRecord.model_validate_json(line)
        except ValidationError as error:
            return _unreadable(line, error)
        if record.round != len(self.rounds) + 1:
            return f"expected round {len(self.rounds) + 1}, found {record.round}"
        names = tuple(module.module for module in record.modules)
        if self.rounds and names != self._names:
            return "other modules than in round 1"
        self._names = names
        self._rows.append([[_figure(m, name) for name in _FIGURES] for m in record.modules])
        self._ranks.append([_rank(m) for m in record.modules])
        self.rounds.append(record.model_copy(update={"modules": ()}))
        return None


def _figure(module: ModuleRecord, name: str) -> float:
    value = getattr(module, name)
    return np.nan if value is None else float(value)


def _rank(module: ModuleRecord) -> float:
    if module.remainder == "none":
        return 0.0
    found = re.fullmatch(r"rank ([0-9]{1,9})", module.remainder)
    return float(found[1]) if found else np.nan


def _unreadable(line: bytes, error: ValidationError) -> str:
    """Why a line is no record: another version's, or damaged."""
    expected = RoundRecord.model_fields["schema_version"].default
    try:
        found = json_object(line).get("schema_version")
    except ValueError:
        return f"not JSON, {short(line.decode('utf-8', 'backslashreplace'))}"
    if found != expected:
        return (
            f"a record of another fedexlora, in format {short(found)}; this one reads {expected}. "
            "Make its report with the version that made it, which is in run.json"
        )
    return "; ".join(_described(error))


def _described(error: ValidationError) -> list[str]:
    found = error.errors(include_url=False, include_context=False, include_input=False)[:3]
    return [f"{'.'.join(map(str, fault['loc'])) or 'all'}: {fault['msg']}" for fault in found]
