"""One cell of a table: one run of a recipe of ours with other settings, and the record kept of it.

A cell is a `fedexlora run` in a process of its own with one thread, as a user would start it. Its
record has the command's settings, so that any row can be made again by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parents[2]
RECORDS = Path(__file__).parent / "records"
SHOWN = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """What is run.

    Attributes:
        key: where the cell stands in its table, such as task, method and seed.
        recipe: name of a file of ``recipes/``, without its ending.
        settings: values of ``--set``; ``{data}`` stands for the folder of the data sets, ``{work}``
            for that of the runs.
        modules: whether each module's deviation and the norm of its ideal are kept too, by round.
    """

    key: Mapping[str, str | int]
    recipe: str
    settings: Sequence[str]
    modules: bool = False

    @property
    def name(self) -> str:
        """A folder's name: another one with other settings."""
        words = "-".join(str(value) for value in self.key.values()).replace(" ", "_")
        return f"{words}-{hashlib.sha256(_text(self.source).encode()).hexdigest()[:8]}"

    @property
    def source(self) -> dict:
        """What a record must agree with to be this cell's."""
        return {
            "key": dict(self.key),
            "recipe": f"{self.recipe}.toml",
            "settings": list(self.settings),
        }


@dataclass(frozen=True)
class Folders:
    """Where data sets are read from, runs are written to, and records are kept."""

    data: Path
    work: Path
    records: Path = RECORDS

    def records_of(self, table: str) -> Path:
        """A table's records, one JSON object a line."""
        return self.records / f"{table}.jsonl"


def read_records(path: Path) -> list[dict]:
    """The records in a file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_cells(table: str, cells: Iterable[Cell], folders: Folders, jobs: int) -> list[dict]:
    """Run the cells that have no record yet, ``jobs`` at a time, and write a record of each.

    A run that was stopped goes on where it was. Records stand in the order of the cells, whatever
    finishes first; those of cells that are no longer asked for are dropped.

    Raises:
        SystemExit: if a run fails; the others' records are kept.
    """
    cells, path = list(cells), folders.records_of(table)
    known = {_source_text(record): record for record in read_records(path)}
    waiting = [cell for cell in cells if _text(cell.source) not in known]
    failed = []

    def write() -> None:
        found = [known[key] for key in (_text(cell.source) for cell in cells) if key in known]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(_text(record) + "\n" for record in found), encoding="utf-8")

    with Progress(console=SHOWN) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task(table, total=len(cells), completed=len(cells) - len(waiting))
        running = {pool.submit(run_cell, table, cell, folders): cell for cell in waiting}
        for done in as_completed(running):
            cell = running[done]
            try:
                record = done.result()
            except subprocess.CalledProcessError as error:
                failed.append(f"{cell.name}: exit code {error.returncode}: {error.stderr[-2000:]}")
                continue
            known[_text(cell.source)] = record
            write()
            progress.advance(task)
    if failed:
        raise SystemExit("\n".join(failed))
    write()
    return read_records(path)


def run_cell(table: str, cell: Cell, folders: Folders) -> dict:
    """Run one cell and return its record."""
    out = folders.work / table / cell.name
    settings = [text.format(data=folders.data, work=folders.work) for text in cell.settings]
    command = [sys.executable, "-m", "fedexlora", "run", str(ROOT / f"recipes/{cell.recipe}.toml")]
    command += ["--out", str(out), "--resume"]
    for text in settings:
        command += ["--set", text]
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | alone)
    return cell.source | _figures(out, modules=cell.modules)


def _figures(out: Path, *, modules: bool) -> dict:
    header = json.loads((out / "run.json").read_text(encoding="utf-8"))
    rounds = read_records(out / "rounds.jsonl")
    figures = {
        "rows": header["clients"],
        "validation_rows": header["validation_rows"],
        "initial_metrics": header["initial_metrics"],
        "metrics": rounds[-1]["metrics"],
        "scorers": header["scorers"],
        "deviation": [record["deviation"] for record in rounds],
        "error": max(record["certificate"]["error"] for record in rounds),
        "seconds": round(sum(sum(record["seconds"].values()) for record in rounds), 1),
        "packages": header["packages"],
        "machine": {name: header["machine"][name] for name in ("processor", "cores", "device")},
    }
    if modules:
        figures["modules"] = [
            {m["module"]: [m["deviation"], m["ideal"]] for m in record["modules"]}
            for record in rounds
        ]
    return figures


def _text(value: Mapping) -> str:
    return json.dumps(value, ensure_ascii=True, sort_keys=True)


def _source_text(record: Mapping) -> str:
    return _text({name: record[name] for name in ("key", "recipe", "settings")})
