"""Who took part, who was left out and why, and how the model does on each client's own rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedexlora.report.chart import LIGHT, Chart, draw, label, legend_below, legend_height
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.tables import Column, Table

_MOST_CLIENTS, _MOST_ROUNDS = 40, 80
"""Of a map of who took part in which round."""
_STATES = ("not asked", "took part", "left out")
_COLOURS = (LIGHT["grid"], LIGHT["c1"], LIGHT["c2"])


@dataclass(slots=True)
class _Part:
    """One client in all rounds of a run."""

    rows: int | None = None
    took: int = 0
    left_out: int = 0
    weight: float = 0.0
    loss: float | None = None
    up: int = 0
    down: int = 0
    seconds: float = 0.0


def participation_map(runs: RunSet) -> list[Chart]:
    """Clients by rounds, of a run alone that is not too large for it."""
    run = runs.alone
    if run is None or not run.rounds:
        return []
    names = list(_parts(runs.cells[0]))
    if len(names) > _MOST_CLIENTS or len(run.rounds) > _MOST_ROUNDS:
        return []
    states = np.zeros((len(names), len(run.rounds)), dtype=int)
    for column, record in enumerate(run.rounds):
        for client in record.clients:
            states[names.index(client.client), column] = 1
        for left in record.left_out:
            states[names.index(left.client), column] = 2

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        extent = (0.5, len(run.rounds) + 0.5, len(names) - 0.5, -0.5)
        axes.pcolormesh(
            np.arange(len(run.rounds) + 1) + 0.5,
            np.arange(len(names) + 1) - 0.5,
            states,
            cmap=ListedColormap(_COLOURS),
            vmin=0,
            vmax=2,
            edgecolors=LIGHT["page"],
            linewidth=1.5,
        )
        axes.set(xlim=extent[:2], ylim=extent[2:], xlabel="round")
        axes.set_yticks(range(len(names)), [label(name, 28) for name in names], fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # type: ignore[call-arg]
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        found = [Patch(color=colour) for colour in _COLOURS]
        legend_below(figure, found, _STATES)

    table = Table.of(
        [Column("client"), *(Column(f"round {r.round}") for r in run.rounds)],
        [(name, *(_STATES[x] for x in row)) for name, row in zip(names, states, strict=True)],
    )
    return [
        draw(
            "participation",
            "Who took part",
            "Clients by rounds: whether a client's update is in the round, was left out, or was "
            "not asked for.",
            table,
            paint,
            height=0.7 + 0.21 * len(names) + legend_height(_STATES),
        )
    ]


def client_table(runs: RunSet) -> Table:
    """A row for every client of every run."""
    rows = [
        (
            cell.label,
            name,
            part.rows,
            part.took,
            part.left_out,
            part.weight / part.took if part.took else None,
            part.loss,
            part.up,
            part.down,
            part.seconds,
        )
        for cell in runs.cells
        for name, part in _parts(cell).items()
    ]
    columns = (
        Column("run"),
        Column("client"),
        Column("training rows", "count"),
        Column("rounds in", "count"),
        Column("left out", "count"),
        Column("mean share", "share"),
        Column("last loss", "score"),
        Column("up", "size"),
        Column("down", "size"),
        Column("training", "seconds"),
    )
    return Table.of(columns, rows)


def left_out_table(runs: RunSet) -> Table:
    """A row for every time that a client was left out."""
    return Table.of(
        (Column("run"), Column("round", "count"), Column("client"), Column("why")),
        [
            (cell.label, record.round, left.client, "; ".join(left.reasons))
            for cell in runs.cells
            for record in cell.run.rounds
            for left in record.left_out
        ],
    )


def _parts(cell: Cell) -> dict[str, _Part]:
    """By client, those that are registered first."""
    known = cell.run.header.clients if cell.run.header else {}
    found = {name: _Part(rows=rows) for name, rows in known.items()}
    for record in cell.run.rounds:
        for client in record.clients:
            part = found.setdefault(client.client, _Part())
            part.rows = client.num_examples
            part.took += 1
            part.weight += client.weight
            part.loss = client.loss
            part.up += client.uploaded_bytes
            part.down += client.downloaded_bytes
            part.seconds += client.seconds
        for left in record.left_out:
            part = found.setdefault(left.client, _Part())
            part.left_out += 1
            part.up += left.uploaded_bytes
            part.down += left.downloaded_bytes
    return found
