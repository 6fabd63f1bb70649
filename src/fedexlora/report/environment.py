"""Where runs ran, and the commands that make them again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from fedexlora.report.header import Environment
from fedexlora.report.run_records import RunRecords
from fedexlora.report.run_set import Cell, RunSet, flat
from fedexlora.report.tables import Column, Table

_VERSION = re.compile(r"[A-Za-z0-9.+!-]+")


def environment_table(runs: RunSet) -> Table:
    """A column for every environment that differs from the others, and for what went on later."""
    found: list[tuple[Environment, list[str]]] = []
    for cell in runs.cells:
        header = cell.run.header
        if header is None:
            continue
        both: list[tuple[Environment, str]] = [(header, cell.label)]
        both += [(x, f"{cell.label} after round {x.after_round}") for x in header.resumed]
        for environment, name in both:
            _add(found, Environment.model_validate(environment.model_dump()), name)
    names = ["all runs"] if len(found) == 1 and not runs.alone else [_named(x) for _, x in found]
    rows = [_facts(environment) for environment, _ in found]
    keys = dict.fromkeys(key for row in rows for key in row)
    return Table.of(
        [Column("what"), *(Column(name) for name in names)],
        [(key, *(row.get(key) for row in rows)) for key in keys],
    )


def packages_command(run: RunRecords) -> str | None:
    """What installs the versions that a run was made with; None where they are not known."""
    if run.header is None or not run.header.packages:
        return None
    # A local part, as in 2.9.0+cpu, is of one index alone.
    wanted = {"fedexlora": run.header.fedexlora, **run.header.packages}
    pins = [f"{name}=={version.split('+')[0]}" for name, version in wanted.items()
            if version and _VERSION.fullmatch(version)]  # fmt: skip
    return shlex.join(["pip", "install", *pins])


def commands(runs: RunSet) -> tuple[list[str], list[Cell]]:
    """A line for every run, from the recipe of the first one.

    Returns:
        The lines, and the runs whose recipes lack a key that the first one has: no option takes one
        away, so that theirs have to be written down.
    """
    first = dict(flat(runs.cells[0].run.recipe))
    lines, apart = [], []
    for place, cell in enumerate(runs.cells, 1):
        own = dict(flat(cell.run.recipe))
        if first.keys() - own.keys():
            apart.append(cell)
            lines.append(_line(cell, f"recipe-{place}.toml", ()))
            continue
        changed = [f"{k}={json.dumps(v)}" for k, v in own.items() if first.get(k) != v]
        lines.append(_line(cell, "recipe.toml", changed))
    return lines, apart


def _line(cell: Cell, recipe: str, changes: Sequence[str]) -> str:
    words = ["fedexlora", "run", recipe, "--out", str(cell.run.folder)]
    return shlex.join([*words, *(x for change in changes for x in ("--set", change))])


def _add(found: list[tuple[Environment, list[str]]], environment: Environment, name: str) -> None:
    for known, names in found:
        if known == environment:
            names.append(name)
            return
    found.append((environment, [name]))


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _facts(environment: Environment) -> dict[str, str]:
    machine = environment.machine
    threads = "" if machine.torch_threads is None else str(machine.torch_threads)
    found = {
        "fedexlora": environment.fedexlora,
        **{name: version or "" for name, version in environment.packages.items()},
        "Python": machine.python,
        "system": f"{machine.system} {machine.processor}".strip(),
        "processor cores": "" if machine.cores is None else str(machine.cores),
        "PyTorch's threads": threads,
        "device": machine.device or "",
        "GPU": machine.cuda or "",
    }
    return {key: value for key, value in found.items() if value}
