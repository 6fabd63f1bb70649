"""The sections of a report, out of the records of its runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fedexlora.report.blocks import Block, Code, Facts, Figures, Notes, Rows, Section, Words
from fedexlora.report.client_charts import client_table, left_out_table, participation_map
from fedexlora.report.client_scores import own_score_chart, own_score_table
from fedexlora.report.comparison import (
    baseline_of,
    comparison_table,
    last_scores_table,
    target_table,
)
from fedexlora.report.cost_charts import cost_charts, cost_table
from fedexlora.report.deviation_charts import deviation_charts
from fedexlora.report.environment import commands, environment_table, packages_command
from fedexlora.report.exactness_charts import (
    certificate_table,
    exactness_charts,
    module_table,
    verdict,
)
from fedexlora.report.run_records import table
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.score_charts import score_charts
from fedexlora.report.tables import Column, Table, Value, show
from fedexlora.texts import size


def sections(runs: RunSet) -> list[Section]:
    """Every section that the records have something for."""
    found = [
        Section("what", "What was run", tuple(_what(runs))),
        Section("curves", "Curves", tuple(_curves(runs))),
        Section("comparison", "Comparison", tuple(_comparison(runs))),
        Section("deviation", "What averaging the factors would lose", tuple(_deviation(runs))),
        Section("certificate", "Certificate", tuple(_certificate(runs))),
        Section("cost", "Bytes and seconds", tuple(_cost(runs))),
        Section("clients", "Who took part", tuple(_clients(runs))),
        Section("own-rows", "Scores by client", tuple(_own_scores(runs))),
        Section(
            "environment", "Environment", (Rows("Versions and machine", environment_table(runs)),)
        ),
        Section("again", "Make it again", tuple(_again(runs))),
    ]
    return [section for section in found if section.blocks]


def title(runs: RunSet) -> str:
    """Of the page."""
    methods = list(dict.fromkeys(cell.run.method for cell in runs.cells))
    tasks = dict.fromkeys(str(table(c.run.recipe, "data").get("source", "?")) for c in runs.cells)
    named = ", ".join(methods[:5]) + (" and more" if len(methods) > 5 else "")
    return f"{named} on {', '.join(list(tasks)[:2])}"


def facts(runs: RunSet) -> list[tuple[str, str]]:
    """The few numbers at the top of the page."""
    cells = runs.cells
    rounds = sum(len(cell.run.rounds) for cell in cells)
    found = [("runs", str(len(cells)))] if len(cells) > 1 else []
    found.append(("finished rounds", str(rounds)))
    run = runs.alone
    if run is not None and run.rounds:
        scores = [x for x in run.scored.values() if runs.headline in x]
        if scores:
            found.append((f"last {runs.headline}", show(scores[-1][runs.headline], "score")))
        worst = max(r.certificate.worst_error for r in run.rounds)
        held = all(r.certificate.held for r in run.rounds)
        found.append(("exact in every round" if held else "not exact: off by", f"{worst:.0e}"))
        lost = max(r.deviation for r in run.rounds)
        found.append(("averaging would lose", show(lost, "share")))
    moved = sum(r.bytes.up + r.bytes.down for cell in cells for r in cell.run.rounds)
    took = sum(sum(r.seconds.values()) for cell in cells for r in cell.run.rounds)
    return [*found, ("moved", size(float(moved))), ("time in rounds", show(took, "seconds"))]


def _what(runs: RunSet) -> list[Block]:
    first = runs.cells[0].run
    blocks: list[Block] = []
    odd = [f"{c.label}: {c.run.state}" for c in runs.cells if not c.run.whole]
    odd += [f"{hole.label}: {hole.reason}" for hole in runs.holes]
    if odd:
        blocks.append(Notes("Not finished", odd))
    if said := _data_notes(runs.cells):
        blocks.append(Notes("Of the data", said))
    if runs.alone is not None:
        blocks.append(Facts(_run_facts(runs.cells[0])))
    else:
        blocks.append(Facts(_shared_facts(runs)))
        blocks.append(Rows("Runs", _runs_table(runs)))
    if not first.rounds and len(runs.cells) == 1:
        blocks.append(Words("There is no finished round, and so nothing to draw."))
    return blocks


def _data_notes(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(n for c in cells if c.run.header for n in c.run.header.notes))


def _run_facts(cell: Cell) -> list[tuple[str, str]]:
    run, header = cell.run, cell.run.header
    found = [("folder", str(run.folder)), ("method", run.method), ("state", run.state)]
    found += _recipe_facts(cell)
    if header is not None:
        rows = header.clients.values()
        if rows:
            text = f"{len(rows)}, with {min(rows):,} to {max(rows):,} training rows"
            found.append(("clients", text))
        if header.validation_rows is not None:
            found.append(("validation rows", f"{header.validation_rows:,}"))
        found.append(("frozen weights", header.precision))
    found.append(("adapted modules", str(len(run.modules.names))))
    return found


def _recipe_facts(cell: Cell) -> list[tuple[str, str]]:
    recipe = cell.run.recipe
    model, task, lora = (table(recipe, name) for name in ("model", "task", "lora"))
    training, partition = table(recipe, "training"), table(recipe, "partition")
    given = (
        ("model", model.get("source")),
        ("task", task.get("kind")),
        ("data", table(recipe, "data").get("source")),
        ("division", _pairs(partition)),
        ("LoRA", _pairs(lora)),
        ("training", _pairs(training)),
        ("seed", cell.run.seed),
    )
    return [(name, str(value)) for name, value in given if value not in (None, "")]


def _pairs(values: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in dict(values).items()) if values else ""  # type: ignore[call-overload]


def _shared_facts(runs: RunSet) -> list[tuple[str, str]]:
    """What holds for all runs."""
    each = [_recipe_facts(cell) for cell in runs.cells]
    found = [fact for fact in each[0] if all(fact in other for other in each)]
    seeds = sorted({cell.run.seed for cell in runs.cells if cell.run.seed is not None})
    arms = (("arms", ", ".join(runs.arms)), ("seeds", ", ".join(map(str, seeds))))
    return [*arms, *(fact for fact in found if fact[0] != "seed")]


def _runs_table(runs: RunSet) -> Table:
    rows: list[Sequence[Value]] = []
    for cell in runs.cells:
        header = cell.run.header
        clients = len(header.clients) if header else None
        rows.append((cell.label, str(cell.run.folder), cell.run.state, clients))
    rows += [(hole.label, None, hole.reason, None) for hole in runs.holes]
    columns = (Column("run"), Column("folder"), Column("state"), Column("clients", "count"))
    return Table.of(columns, rows)


def _curves(runs: RunSet) -> list[Block]:
    if not any(cell.run.rounds for cell in runs.cells):
        return []
    charts = score_charts(runs)
    last = last_scores_table(runs)
    blocks: list[Block] = [Figures(charts)] if charts else []
    if len(last.columns) > 2:
        blocks.append(Rows("Scores after the last scored round", last))
    return blocks


def _comparison(runs: RunSet) -> list[Block]:
    if len(runs.arms) < 2 and runs.comparison is None:
        return []
    blocks: list[Block] = []
    if differing := runs.differences():
        blocks.append(Notes("These runs differ in more than their recipes", differing))
    varying = {k: v for k, v in runs.varying().items() if k != "federation.seed"}
    if varying:
        said = [(k, ", ".join(dict.fromkeys(map(_value, v)))) for k, v in varying.items()]
        blocks += [Words("Their recipes differ in:"), Facts(said)]
    blocks.append(Rows("By arm", comparison_table(runs)))
    blocks.append(Words(_how(runs)))
    if (found := target_table(runs)) is not None:
        blocks.append(Rows("To reach the target", found))
    return blocks


def _value(value: object) -> str:
    return "unset" if value is None else str(value)


def _how(runs: RunSet) -> str:
    said = "Scores are those after the last round, of runs that are whole; ± is the standard "
    said += "deviation over seeds (n - 1)."
    baseline, record = baseline_of(runs), runs.comparison
    if baseline is not None:
        said += f" Differences are paired by seed, less {baseline}"
        if record is not None:
            said += f", with {record.confidence:.0%} bootstrap intervals of their mean"
        said += "."
    if record is not None:
        apart = [text for seed in record.same_start for text in seed.differences]
        same = "All runs of a seed start from the same data order and initial adapter."
        said += f" {same if not apart else 'Not the same at the start: ' + '; '.join(apart) + '.'}"
    return said


def _deviation(runs: RunSet) -> list[Block]:
    charts = deviation_charts(runs)
    if not charts:
        return []
    words = (
        "With M = s Σ wᵢ Bᵢ Aᵢ, the ideal update of a round, and R = M − s B̄ Ā, what FedIT's mean "
        "of the factors lacks of it, the deviation is |R| / |M| in Frobenius norms (FedEx-LoRA, "
        "arXiv:2410.09432, Sec. 5). The paper's “scaled Frobenius norm” has no stated scale; this "
        "one is relative to the ideal update of the same modules and round."
    )
    return [Words(words), Figures(charts)]


def _certificate(runs: RunSet) -> list[Block]:
    charts = exactness_charts(runs)
    if not charts:
        return []
    said = [Words(f"{cell.label}: {verdict(cell)}.") for cell in runs.cells[:1] if runs.alone]
    blocks: list[Block] = [*said, Figures(charts), Rows("By run", certificate_table(runs))]
    if runs.alone is not None:
        found = module_table(runs.cells[0])
        blocks.append(Rows("By module, after the last round", found, folded=True))
    return blocks


def _cost(runs: RunSet) -> list[Block]:
    charts = cost_charts(runs)
    return [Figures(charts), Rows("All rounds", cost_table(runs))] if charts else []


def _clients(runs: RunSet) -> list[Block]:
    charts, left, all_ = participation_map(runs), left_out_table(runs), client_table(runs)
    blocks: list[Block] = [Figures(charts)] if charts else []
    if all_.rows:
        blocks.append(Rows("Clients", all_, folded=len(all_.rows) > 30))
    if not any(cell.run.rounds for cell in runs.cells):
        return blocks
    if left.rows:
        blocks.append(Rows("Left out, and why", left))
    else:
        blocks.append(Words("Nobody was left out of a round."))
    return blocks


def _own_scores(runs: RunSet) -> list[Block]:
    charts, rows = own_score_chart(runs), own_score_table(runs)
    blocks: list[Block] = [Figures(charts)] if charts else []
    return (
        [*blocks, Rows("The last version that each client scored", rows)] if rows.rows else blocks
    )


def _again(runs: RunSet) -> list[Block]:
    first = runs.cells[0]
    blocks: list[Block] = []
    if (packages := packages_command(first.run)) is not None:
        blocks.append(Code("The same packages", packages))
    blocks.append(Code(f"recipe.toml, as {first.label} resolved it", first.run.recipe_text, True))
    lines, apart = commands(runs)
    if runs.comparison is not None:
        lines = [runs.comparison.command]
    blocks.append(Code("The runs, with that recipe", "\n".join(lines)))
    blocks += [Code(f"recipe.toml of {c.label}", c.run.recipe_text, True) for c in apart]
    return blocks


def report_command(folders: Sequence[Path], out: Path) -> str:
    """What makes the page again from the folders."""
    words = ["fedexlora", "report", *map(str, folders), "--out", str(out)]
    return shlex.join(words)
