"""Make the tables of docs/results.md again, from nothing.

    python -m benchmarks.results [glue deviation e2e] [--smoke] [--jobs 2]

A stopped command goes on where it was. Records go to ``benchmarks/results/records`` and the tables
into the documents; with ``--smoke``, records go to a folder beside the runs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.results import deviation, e2e, glue
from benchmarks.results.cell import RECORDS, ROOT, Folders, run_cells
from benchmarks.results.document import write_tables

TABLES = {"glue": glue, "deviation": deviation, "e2e": e2e}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--smoke", action="store_true", help="one cell of each, in minutes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "results")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    work = options.work.resolve() / ("smoke" if options.smoke else "full")
    records = work / "records" if options.smoke else RECORDS
    folders = Folders(options.data.resolve(), work, records)
    started = time.perf_counter()
    for name in options.tables or TABLES:
        if name == "e2e":
            e2e.prepare(folders, smoke=options.smoke)
        run_cells(name, TABLES[name].cells(smoke=options.smoke), folders, options.jobs)
    if not options.smoke:
        write_tables(RECORDS)
    print(f"{time.perf_counter() - started:.0f} s; records in {records}")


if __name__ == "__main__":
    main()
