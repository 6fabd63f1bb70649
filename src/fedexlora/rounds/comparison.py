"""The runs of a comparison: side by side in processes of their own, and what their folders say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from fedexlora.errors import FedexLoraError, InputError, ResumeError
from fedexlora.exchange.comparison_records import CellRecord, PointRecord, SeedRecord
from fedexlora.exchange.records import BytesRecord
from fedexlora.exchange.scores import scores_by_version
from fedexlora.rounds.comparison_plan import Cell
from fedexlora.rounds.folder import RunFolder
from fedexlora.texts import printable

Ended = Callable[[Sequence[CellRecord]], None]
"""Called with all cells as they stand, whenever one ends."""
_NOT_YET = "it has not been run"
_REASON = 400


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison's folder and its cells."""

    path: Path
    recipe: Path
    """The file that was named."""
    cells: Sequence[Cell]

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that holds something else.

        Raises:
            ResumeError: if there is anything in it and it is not to be gone on with; or naming all
                cells whose folder holds another run.
        """
        there = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if there and not resume:
            raise ResumeError(
                f"--out {self.path} is not empty",
                ["choose another folder, or go on with a comparison by --resume"],
            )
        faults = []
        for cell in self.cells:
            try:
                self._folder(cell).check_same(cell.recipe)
            except ResumeError as error:
                faults += [f"{cell.run}: {x}" for x in error.faults or (error.summary,)]
        if faults:
            raise ResumeError(f"{self.path} holds runs of other recipes", faults)

    def run(self, jobs: int, ended: Ended) -> list[CellRecord]:
        """Run every cell that is not finished.

        Args:
            jobs: how many at a time.
            ended: told whenever one ends.

        Returns:
            All cells, in order; those that failed are holes.
        """
        reasons: dict[int, str] = {}
        todo = [i for i, cell in enumerate(self.cells) if not self._finished(cell)]
        places = _places(jobs)
        with ThreadPoolExecutor(jobs) as pool:
            waiting: dict[Future[str], int] = {
                pool.submit(self._one, self.cells[i], places, jobs): i for i in todo
            }
            try:
                while waiting:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        reasons[waiting.pop(future)] = future.result()
                    ended(self.read(reasons))
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise
        return self.read(reasons)

    def read(self, reasons: Mapping[int, str]) -> list[CellRecord]:
        """All cells as their folders have them.

        Args:
            reasons: by cell, why its last process failed; empty if it did not.
        """
        return [self._record(cell, reasons.get(i, _NOT_YET)) for i, cell in enumerate(self.cells)]

    def same_start(self) -> list[SeedRecord]:
        """By seed, whether its runs have the same rows, clients and initial adapter."""
        seeds = dict.fromkeys(cell.seed for cell in self.cells)
        found = (self._same_start([c for c in self.cells if c.seed == seed]) for seed in seeds)
        return [record for record in found if record is not None]

    def _same_start(self, cells: Sequence[Cell]) -> SeedRecord | None:
        headers = {c.arm.name: h for c in cells if (h := self._folder(c).read_header())}
        if len(headers) < 2:
            return None
        first, *others = headers
        differences = {
            key: [
                f"{other}: {said} differs from that of {first}"
                for other in others
                if headers[other].get(key) != headers[first].get(key)
            ]
            for key, said in (
                ("data", "the data"),
                ("clients", "the division among clients"),
                ("initial", "the initial adapter or heads"),
            )
        }
        return SeedRecord(
            seed=cells[0].seed,
            data=not differences["data"] and not differences["clients"],
            adapter=not differences["initial"],
            differences=tuple(line for lines in differences.values() for line in lines),
        )

    def _folder(self, cell: Cell) -> RunFolder:
        return RunFolder(self.path / cell.run)

    def _finished(self, cell: Cell) -> bool:
        folder = self._folder(cell)
        return folder.read_header() is not None and folder.has_ended(cell.recipe)

    def _one(self, cell: Cell, places: SimpleQueue[str | None], jobs: int) -> str:
        """Run one cell; returns why it failed, or nothing."""
        out, log = self.path / cell.run, self.path / f"{cell.run}.log"
        changes = [word for change in cell.overrides for word in ("--set", change)]
        command = [sys.executable, "-m", "fedexlora", "run", str(self.recipe), "--resume", "--json"]
        place = places.get()
        environment = dict(os.environ)
        if jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"
        if place is not None:
            environment["CUDA_VISIBLE_DEVICES"] = place
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as file:
                done = subprocess.run(
                    [*command, "--out", str(out), *changes],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # the records are in the folder
                    stderr=file,
                    env=environment,
                    check=False,
                )
        finally:
            places.put(place)
        return "" if done.returncode == 0 else _reason(log, done.returncode)

    def _record(self, cell: Cell, reason: str) -> CellRecord:
        curve: tuple[PointRecord, ...] = ()
        try:
            curve = _curve(self._folder(cell), cell.recipe.federation.rounds)
            hole = None if self._finished(cell) else reason or _NOT_YET
        except FedexLoraError as error:
            hole = str(error)
        return CellRecord(
            arm=cell.arm.name,
            method=cell.arm.method,
            settings=dict(cell.arm.settings),
            seed=cell.seed,
            run=cell.run,
            hole=hole,
            curve=curve,
        )


def _curve(folder: RunFolder, rounds: int) -> tuple[PointRecord, ...]:
    """Round 0 and every round that is finished; nothing before round 0 is."""
    header = folder.read_header()
    if header is None:
        return ()
    up = down = 0
    seconds = 0.0
    initial = header["initial_metrics"]
    points = [PointRecord(round=0, metrics=initial, bytes=BytesRecord(up=0, down=0), seconds=0.0)]
    records = folder.read_records(rounds)
    scored = scores_by_version(initial, records, folder.read_finish())
    for record in records:
        up, down = up + record.bytes.up, down + record.bytes.down
        seconds += sum(record.seconds.values())
        moved = BytesRecord(up=up, down=down)
        points.append(
            PointRecord(
                round=record.round,
                metrics=scored.get(record.round, {}),
                bytes=moved,
                seconds=seconds,
            )
        )
    return tuple(points)


def _places(jobs: int) -> SimpleQueue[str | None]:
    """A GPU for each run that is going on, in turns; None where there is none.

    Raises:
        InputError: if there are several GPUs, and not one for each run.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    devices = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    if count and jobs > count:
        raise InputError(f"--jobs {jobs}: expected at most {count}, one for each GPU")
    places: SimpleQueue[str | None] = SimpleQueue()
    for i in range(jobs):
        places.put(devices[i] if devices else None)
    return places


def _reason(log: Path, code: int) -> str:
    """The error that a run ended with, from what it printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for place in range(len(lines) - 1, -1, -1):
        if lines[place].startswith("error "):
            said = "; ".join(line.strip() for line in lines[place:] if line.strip())
            return printable(said.removeprefix("error "), _REASON)
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return printable(f"exit code {code}: {last}", _REASON)
