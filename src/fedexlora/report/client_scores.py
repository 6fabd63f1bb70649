"""How versions do on each client's own rows, where clients score."""

from __future__ import annotations

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from fedexlora.exchange.records import ClientScores
from fedexlora.report.chart import Chart, draw, label, legend_below, legend_height, series
from fedexlora.report.lines import finish_axes
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.tables import Column, Table

_MOST_CLIENTS = 12
"""Lines of a figure."""
_MOST_METRICS = 4


def own_score_chart(runs: RunSet) -> list[Chart]:
    """The headline of every client by version, of a run alone that has few clients."""
    run, metric = runs.alone, runs.headline
    if run is None:
        return []
    found = {
        client: {x: scores.metrics[metric] for x, scores in by.items() if metric in scores.metrics}
        for client, by in _by_client(runs.cells[0]).items()
    }
    found = {client: curve for client, curve in found.items() if curve}
    if not found or len(found) > _MOST_CLIENTS:
        return []
    names = [label(client, 30) for client in found]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles: list[Artist] = []
        for place, curve in enumerate(found.values()):
            handles += axes.plot(list(curve), list(curve.values()), **series(place))
        finish_axes(axes, "after round", metric)
        legend_below(figure, handles, names)

    versions = sorted({x for curve in found.values() for x in curve})
    table = Table.of(
        [Column("after round", "count"), *(Column(client, "score") for client in found)],
        [(x, *(curve.get(x) for curve in found.values())) for x in versions],
    )
    return [
        draw(
            "score-by-client",
            f"{metric} by client",
            f"{metric} of the global model on each client's own held-out rows, of the versions "
            "that it scored.",
            table,
            paint,
            height=2.6 + legend_height(names),
        )
    ]


def own_score_table(runs: RunSet) -> Table:
    """A row for every client of every run: its scores of the last version that it scored."""
    last = [
        (cell.label, client, *list(by.items())[-1])
        for cell in runs.cells
        for client, by in _by_client(cell).items()
    ]
    names = dict.fromkeys([runs.headline] if runs.headline else [])
    names |= dict.fromkeys(name for *_, scores in last for name in scores.metrics)
    shown = [name for name in names if any(name in scores.metrics for *_, scores in last)]
    columns = [Column("run"), Column("client"), Column("after round", "count")]
    columns += [Column("own rows", "count")]
    columns += [Column(name, "score") for name in shown[:_MOST_METRICS]]
    return Table.of(
        columns,
        [
            (run, client, version, scores.rows, *map(scores.metrics.get, shown[:_MOST_METRICS]))
            for run, client, version, scores in last
        ],
    )


def _by_client(cell: Cell) -> dict[str, dict[int, ClientScores]]:
    """By client and version, its scores; those of a round are of the version before it."""
    found: dict[str, dict[int, ClientScores]] = {}
    for record in cell.run.rounds:
        for client in record.clients:
            if client.scores is not None:
                version = record.round - 1 - client.staleness
                found.setdefault(client.client, {})[version] = client.scores
    if (finish := cell.run.finish) is not None:
        for last in finish.clients:
            found.setdefault(last.client, {})[finish.version] = last.scores
    return found
