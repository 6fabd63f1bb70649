"""The runs of one report: by arm and seed, with what differs between them.

An *arm* is a method with its settings, over all seeds; as in ``exchange.comparison_records``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from fedexlora.errors import InputError
from fedexlora.exchange.comparison_records import CellRecord, ComparisonRecord
from fedexlora.report.run_records import RunRecords, read_run
from fedexlora.texts import cut, printable

COMPARISON = "compare.json"
_SEED = "federation.seed"
_METHOD = ("method.name", "federation.method")


@dataclass(frozen=True)
class Cell:
    """One run under the names that the report gives it."""

    arm: str
    label: str
    """The arm, with the seed where there are several."""
    run: RunRecords


@dataclass(frozen=True)
class Hole:
    """A cell of a comparison that has no run, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class RunSet:
    """All runs of a report."""

    cells: tuple[Cell, ...]
    holes: tuple[Hole, ...] = ()
    comparison: ComparisonRecord | None = None
    """What ``compare`` found; None for runs that were named one by one."""

    @cached_property
    def arms(self) -> Mapping[str, tuple[Cell, ...]]:
        """The cells by arm, in order."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.arm, []).append(cell)
        return {arm: tuple(cells) for arm, cells in found.items()}

    @property
    def alone(self) -> RunRecords | None:
        """The run, if there is only one."""
        return self.cells[0].run if len(self.cells) == 1 else None

    @cached_property
    def headline(self) -> str:
        """The metric that runs are compared by: that of the first one that has scores."""
        if self.comparison is not None:
            return self.comparison.headline
        named = (cell.run.header.headline for cell in self.cells if cell.run.header)
        return next((name for name in named if name), "")

    def place(self, cell: Cell) -> int:
        """The number of a cell's arm, which its colour goes by."""
        return list(self.arms).index(cell.arm)

    def varying(self) -> dict[str, list[object]]:
        """The recipes' keys of which cells have different values, with each cell's."""
        return _varying([cell.run.recipe for cell in self.cells])

    def differences(self) -> list[str]:
        """What runs of one comparison should have in common, and these have not."""
        found = []
        headers = [cell.run.header for cell in self.cells]
        named: list[tuple[str, list[object]]] = [
            ("data", [h and h.data for h in headers]),
            ("base weights", [h and h.base for h in headers]),
            ("judged by", [h and h.headline for h in headers]),
            ("fedexlora", [h and h.fedexlora for h in headers]),
            *_packages(headers),
            ("device", [h and h.machine.device for h in headers]),
        ]
        for what, values in named:
            known = [value for value in values if value]
            if len(set(known)) > 1:
                found.append(f"{what}: {self._by_value(values)}")
        rounds = [len(cell.run.rounds) for cell in self.cells]
        if len(set(rounds)) > 1:
            found.append(f"finished rounds: {self._by_value(rounds)}")
        return found

    def _by_value(self, values: Sequence[object]) -> str:
        """Each value with the cells that have it."""
        by: dict[str, list[str]] = {}
        for cell, value in zip(self.cells, values, strict=True):
            by.setdefault("unknown" if value is None else str(value), []).append(cell.label)
        return "; ".join(f"{cut(value, 40)} in {_listed(cells)}" for value, cells in by.items())


def read_runs(folders: Sequence[Path]) -> RunSet:
    """Read run folders, or the folder of one comparison.

    Args:
        folders: at least one.

    Raises:
        InputError: if one of them is neither, is named twice, or cannot be read; lists all faults.
    """
    faults = [f"{folder}: no folder" for folder in folders if not folder.is_dir()]
    places = [folder.resolve() for folder in folders]
    faults += [f"{x}: named twice" for i, x in enumerate(folders) if places[i] in places[:i]]
    compared = [folder for folder in folders if (folder / COMPARISON).is_file()]
    if compared and len(folders) > 1:
        faults += [f"{x}: a comparison has a report of its own" for x in compared]
    if faults:
        raise InputError("these folders have no report", faults)
    if compared:
        return _compared(compared[0])
    runs = _read_all(folders)
    names = _arm_names(runs)
    return RunSet(tuple(_labelled(list(zip(names, runs, strict=True)))))


def flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """A recipe's keys and values, ``table.key`` by ``table.key``."""
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _compared(folder: Path) -> RunSet:
    path = folder / COMPARISON
    try:
        record = ComparisonRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: no comparison of this version", [str(error)]) from error
    faults = [f"{cell.run}: not below it" for cell in record.cells if not _below(cell.run)]
    if faults:
        raise InputError(f"{path}: runs outside of its folder", faults)
    begun = [cell for cell in record.cells if (folder / cell.run / "recipe.toml").is_file()]
    runs = _read_all([folder / cell.run for cell in begun])
    pairs = [(cell.arm, run) for cell, run in zip(begun, runs, strict=True)]
    holes = tuple(
        Hole(_cell_name(cell), cell.hole or "its folder is gone")
        for cell in record.cells
        if cell.hole is not None or cell not in begun
    )
    return RunSet(tuple(_labelled(pairs)), holes, record)


def _cell_name(cell: CellRecord) -> str:
    return f"{cell.arm}, seed {cell.seed}"


def _below(run: str) -> bool:
    path = PurePosixPath(run)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in run


def _read_all(folders: Sequence[Path]) -> list[RunRecords]:
    runs, faults = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except InputError as error:
            faults += [f"{error.summary}: {fault}" for fault in error.faults]
    if faults:
        raise InputError("these folders have no report", faults)
    return runs


def _arm_names(runs: Sequence[RunRecords]) -> list[str]:
    """By run: its method, and the settings in which runs of that method differ."""
    names = [""] * len(runs)
    for method in {run.method for run in runs}:
        places = [place for place, run in enumerate(runs) if run.method == method]
        differing = _varying([runs[place].recipe for place in places])
        settings = {k: v for k, v in differing.items() if k not in (_SEED, *_METHOD)}
        for i, place in enumerate(places):
            own = ((k, v[i]) for k, v in settings.items() if v[i] is not None)
            said = (f"{k.split('.')[-1]}={cut(str(value), 24)}" for k, value in own)
            names[place] = ", ".join((method, *said))
    return names


def _labelled(pairs: Sequence[tuple[str, RunRecords]]) -> Iterator[Cell]:
    """Cells whose labels are all different: by seed, and by folder where that does not do."""
    arms = [arm for arm, _ in pairs]
    seeds = len({run.seed for _, run in pairs}) > 1
    labels = [
        f"{arm}, seed {run.seed}" if seeds or arms.count(arm) > 1 else arm for arm, run in pairs
    ]
    for (arm, run), label in zip(pairs, labels, strict=True):
        known = label if labels.count(label) == 1 else f"{label} ({run.folder})"
        yield Cell(arm, printable(known), run)


def _varying(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[object]]:
    tables = [dict(flat(recipe)) for recipe in recipes]
    keys = dict.fromkeys(key for table in tables for key in table)
    found = {key: [table.get(key) for table in tables] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def _packages(headers: Sequence[Any]) -> list[tuple[str, list[object]]]:
    names = dict.fromkeys(name for h in headers if h for name in h.packages)
    return [(name, [h and h.packages.get(name) for h in headers]) for name in names]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
