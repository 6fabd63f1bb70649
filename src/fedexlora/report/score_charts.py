"""Scores and losses by round, and scores by what was moved."""

from __future__ import annotations

from math import isfinite

from fedexlora.report.chart import Chart
from fedexlora.report.lines import SINGLE, Curve, line_chart
from fedexlora.report.run_set import Cell, RunSet

_MOST = 4
"""Metrics that have a figure; all are in the table of the last scores."""


def score_charts(runs: RunSet) -> list[Chart]:
    """The scores, the training loss, and the headline by bytes."""
    found = [_score_chart(runs, metric) for metric in metrics(runs)[:_MOST]]
    found.append(
        line_chart(
            runs,
            _losses,
            name="training-loss",
            title="Training loss",
            description="Mean training loss of each round's clients, by their weights.",
            form="score",
            up="training loss",
        )
    )
    if runs.headline:
        found.append(
            line_chart(
                runs,
                lambda cell: _by_bytes(cell, runs.headline),
                name="score-by-bytes",
                title=f"{runs.headline} by bytes moved",
                description=f"{runs.headline} of the global model against the megabytes that all "
                "clients had sent and received by then.",
                form="score",
                across="MB moved so far",
                up=runs.headline,
            )
        )
    return [chart for chart in found if chart is not None]


def metrics(runs: RunSet) -> list[str]:
    """The names of all scores, the headline first; counts are none."""
    names = dict.fromkeys([runs.headline] if runs.headline else [])
    for cell in runs.cells:
        for found in cell.run.scored.values():
            names |= dict.fromkeys(name for name in found if "/" not in name)
    return list(names)


def scores(cell: Cell, metric: str) -> Curve:
    """A metric by round, that before the first one included."""
    found = {float(x): by[metric] for x, by in cell.run.scored.items() if metric in by}
    return {x: y for x, y in found.items() if isfinite(y)}


def _score_chart(runs: RunSet, metric: str) -> Chart | None:
    headline = metric == runs.headline
    return line_chart(
        runs,
        lambda cell: scores(cell, metric),
        name="score" if headline else f"score-{_file_name(metric)}",
        title=f"{metric} by round",
        description=f"{metric} of the global model after each round; round 0 is before training."
        + _seeds(runs),
        form="score",
        up=metric,
    )


def _losses(cell: Cell) -> Curve:
    found = {}
    for record in cell.run.rounds:
        whole = sum(client.weight for client in record.clients)
        loss = sum(client.weight * client.loss for client in record.clients)
        if whole and isfinite(loss):
            found[float(record.round)] = loss / whole
    return found


def _by_bytes(cell: Cell, metric: str) -> Curve:
    found, moved, by_round = {}, 0, scores(cell, metric)
    if 0.0 in by_round:
        found[0.0] = by_round[0.0]
    for record in cell.run.rounds:
        moved += record.bytes.up + record.bytes.down
        if record.round in by_round:
            found[moved / 1e6] = by_round[record.round]
    return found


def _seeds(runs: RunSet) -> str:
    """How seeds are drawn, where there are several."""
    if all(len(cells) == 1 for cells in runs.arms.values()):
        return ""
    if len(runs.cells) > SINGLE:
        return " Lines are means over seeds; the table has each."
    return " Faint lines are single seeds, the strong one is their mean."


def _file_name(metric: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in metric)[:40]
