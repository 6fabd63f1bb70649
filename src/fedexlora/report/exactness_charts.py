"""The certificate of every round: how far the model was from the ideal, and what came out of it."""

from __future__ import annotations

import numpy as np

from fedexlora.exchange.records import HoldersRecord
from fedexlora.report.chart import Chart
from fedexlora.report.lines import Curve, line_chart
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.tables import Column, Table, Value


def exactness_charts(runs: RunSet) -> list[Chart]:
    """Held, forward and kept, by round."""
    found = [
        line_chart(
            runs,
            _worst,
            name="certificate-held",
            title="Held: error against the ideal",
            description="|applied - ideal| / |ideal| of the worst module, read back from the "
            "model, on a logarithmic scale.",
            form="error",
            up="error, worst module",
            logarithmic=True,
        ),
        line_chart(
            runs,
            _forward,
            name="certificate-forward",
            title="Forward: as the layers multiply",
            description="The same once every operand is rounded as its layer rounds it; the worst "
            "module, on a logarithmic scale.",
            form="error",
            up="error, worst module",
            logarithmic=True,
        ),
        line_chart(
            runs,
            _kept,
            name="certificate-kept",
            title="Kept: what comes out of the remainder",
            description="The share of the remainder that comes out of the layers over validation "
            "rows; 100 is all of it.",
            form="share",
            up="% of the remainder",
        ),
    ]
    return [chart for chart in found if chart is not None]


def certificate_table(runs: RunSet) -> Table:
    """A row for every run: the worst of its rounds."""
    return Table.of(
        (
            Column("run"),
            Column("remainder"),
            Column("rounds held"),
            Column("worst error", "error"),
            Column("allowed there", "error"),
            Column("worst forward", "error"),
            Column("kept, furthest from all", "share"),
            Column("truncated, at most", "share"),
        ),
        [_certificate_row(cell) for cell in runs.cells],
    )


def module_table(cell: Cell) -> Table:
    """A row for every module of a run, after its last round."""
    modules = cell.run.modules
    figures = {name: values[-1] for name, values in modules.figures.items()}
    against = np.divide(
        figures["remainder_norm"],
        modules.weights,
        out=np.full(len(modules.names), np.nan),
        where=modules.weights > 0,
    )
    columns = (
        ("error", "error", figures["error"]),
        ("allowed", "error", figures["allowed"]),
        ("forward", "error", figures["forward"]),
        ("kept", "share", figures["kept"]),
        ("deviation", "share", figures["deviation"]),
        ("remainder's rank", "number", modules.ranks[-1]),
        ("remainder / weight", "share", against),
        ("a bf16 fold would lose", "share", figures["bf16_loss"]),
    )
    return Table.of(
        [Column("module"), *(Column(name, form) for name, form, _ in columns)],  # type: ignore[arg-type]
        [
            (name, *(_known(values[place]) for _, _, values in columns))
            for place, name in enumerate(modules.names)
        ],
    )


def verdict(cell: Cell) -> str:
    """In one sentence, whether the model was the clients' mean in every round."""
    records = cell.run.rounds
    if not records:
        return "no round is finished"
    held = sum(record.certificate.held for record in records)
    worst = max(_worst(cell).values())
    if held == len(records):
        return (
            f"in every round the model applied the clients' mean update; the worst module was off "
            f"by {worst:.1e} of it"
        )
    off = max(record.certificate.error for record in records)
    return (
        f"in {len(records) - held} of {len(records)} rounds the model was not the clients' mean: "
        f"off by up to {off:.1%} of it"
    )


def _certificate_row(cell: Cell) -> tuple[Value, ...]:
    records, figures = cell.run.rounds, cell.run.modules.figures
    if not records:
        return (cell.label, *[None] * 7)
    place = np.unravel_index(
        np.argmax(figures["error"] / figures["allowed"]), figures["error"].shape
    )
    return (
        cell.label,
        ", ".join(dict.fromkeys(record.certificate.placement for record in records)),
        f"{sum(record.certificate.held for record in records)} of {len(records)}",
        float(figures["error"][place]),
        float(figures["allowed"][place]),
        max(_forward(cell).values(), default=None),
        max(_kept(cell).values(), key=lambda share: abs(share - 1.0), default=None),
        max(record.certificate.truncated for record in records),
    )


def _worst(cell: Cell) -> Curve:
    return {float(r.round): r.certificate.worst_error for r in cell.run.rounds}


def _forward(cell: Cell) -> Curve:
    """Of the server's model; where it has none, the worst of the clients'."""
    found = {float(r.round): r.certificate.worst_forward for r in cell.run.rounds}
    for version, holders in _holders(cell):
        if found.get(version) is None:
            found[version] = holders.forward
    return {x: y for x, y in sorted(found.items()) if y is not None}


def _kept(cell: Cell) -> Curve:
    """The same of what comes out of the remainder."""
    found = {float(r.round): r.certificate.kept for r in cell.run.rounds}
    for version, holders in _holders(cell):
        if found.get(version) is None:
            found[version] = holders.kept
    return {x: y for x, y in sorted(found.items()) if y is not None}


def _holders(cell: Cell) -> list[tuple[float, HoldersRecord]]:
    """What clients say of their models, by the version that they hold."""
    found = (record.holders for record in cell.run.rounds)
    return [(float(x.version), x) for x in found if x is not None and x.version]


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
