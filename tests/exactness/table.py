"""Write the measured tables of docs/exactness.md: ``python -m tests.exactness.table``.

It took from 2 to 24 minutes on one core of shared machines.
"""

from __future__ import annotations

import platform
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

from tests.exactness.cells import (
    DTYPES,
    MODELS,
    NEXT,
    RANKS,
    ROUNDS,
    Cell,
    Outcome,
    autocast_cells,
    cells,
    method_cells,
    play,
)

PAGE = Path(__file__).parents[2] / "docs" / "exactness.md"
START, END = (
    "<!-- measured: python -m tests.exactness.table -->",
    "<!-- end of what is measured -->",
)
NAMES = {model: title for title, model in MODELS.items()}


def main() -> None:
    """Measure and write."""
    folded = [
        (cell, play(cell), play(replace(cell, placement="fold")))
        for model in track(("llama-gqa", "roberta"), "folding")
        for cell in (Cell(model, d, "equal", "mean") for d in DTYPES if d != "float32")
    ]
    outcomes = {cell: play(cell) for cell in track(list(cells()), "cells")}
    narrow = [
        (cell, play(cell), play(replace(cell, placement="fold")) if _may_fold(cell) else None)
        for cell in track(autocast_cells(), "autocast")
    ]
    others = {cell: play(cell) for cell in track(method_cells(), "methods")}
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    measured = _by_base(outcomes), _by_method(others), _folding(folded), _autocast(narrow)
    parts = _summary(outcomes), *measured
    made = "\n".join([START, "", *(line for part in parts for line in part), END])
    PAGE.write_text(before + made + after, encoding="utf-8")
    failed = [cell for cell, x in (outcomes | others).items() if x.share > 1.0]
    sys.exit(f"not exact: {failed}" if failed else 0)


def _summary(outcomes: dict[Cell, Outcome]) -> list[str]:
    every = list(outcomes.values())
    error = max(o.error for o in every)
    beside = max(o.error for o in every if o.placements == "side")
    share, own, output = (max(getattr(o, x) for o in every) for x in ("share", "own", "output"))
    return [
        (
            f"{len(outcomes)} federations, {ROUNDS} rounds each; torch {torch.__version__}, "
            f"{platform.machine()}, one thread. Largest error of a layer: "
            f"{error:.1e}; beside the weight {beside:.1e}; largest share of what is allowed "
            f"{share:.2f}; in the models of clients with their own adapters {own:.1e}; of a "
            f"layer's output in float32 beside the weight {output:.1e}."
        ),
        "",
    ]


def _by_base(outcomes: dict[Cell, Outcome]) -> list[str]:
    titles = ["model", "base", "remainder", *RANKS, "forward", "kept", "averaging loses"]
    lines = [
        "Largest error by ranks, over all next adapters; and what averaging factors would lose:",
        "",
        f"| {' | '.join(titles)} |",
        f"|---|---|---|{'---:|' * (len(RANKS) + 3)}",
    ]
    groups: dict[tuple[str, str], dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for cell, outcome in outcomes.items():
        groups[cell.model, cell.dtype][cell.ranks].append(outcome)
    for (model, dtype), by_ranks in groups.items():
        worst = " | ".join(f"{max(o.error for o in by_ranks[r]):.1e}" for r in RANKS)
        lost = [o.averaging for r in RANKS for o in by_ranks[r] if o.averaging == o.averaging]
        where = by_ranks["equal"][0].placements
        through = _through([o for r in RANKS for o in by_ranks[r]])
        lines.append(
            f"| {NAMES[model]} | {dtype} | {where} | {worst} | {through} "
            f"| {min(lost):.0%} to {max(lost):.0%} |"
        )
    lines += ["", "Largest error by next adapter:", ""]
    lines += [f"| next adapter | {' | '.join(DTYPES)} |", f"|---|{'---:|' * len(DTYPES)}"]
    for name in NEXT:
        found = [
            max(o.error for c, o in outcomes.items() if (c.next_adapter, c.dtype) == (name, dtype))
            for dtype in DTYPES
        ]
        lines.append(f"| `{name}` | {' | '.join(f'{error:.1e}' for error in found)} |")
    return [*lines, ""]


def _by_method(outcomes: dict[Cell, Outcome]) -> list[str]:
    bases = list(dict.fromkeys((cell.model, cell.dtype) for cell in outcomes))
    titles = [f"{NAMES[model]}, {dtype}" for model, dtype in bases]
    lines = [
        "Largest error of a layer, by method, of what the method is held to (equal ranks):",
        "",
        f"| method | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(bases)}",
    ]
    for name in dict.fromkeys(cell.method for cell in outcomes):
        found = [
            outcome.error
            for base in bases
            for cell, outcome in outcomes.items()
            if (cell.method, cell.model, cell.dtype) == (name, *base)
        ]
        lines.append(f"| `{name}` | {' | '.join(f'{error:.1e}' for error in found)} |")
    return [*lines, ""]


def _through(outcomes: list[Outcome]) -> str:
    """The largest forward error of a layer, and the share of remainders furthest from all."""
    certificates = [o.records[-1].certificate for o in outcomes]
    forward = max(c.worst_forward for c in certificates)
    kept = max((c.kept for c in certificates), key=lambda share: abs(share - 1.0))
    return f"{forward:.1e} | {kept:.4f}"


def _may_fold(cell: Cell) -> bool:
    """A tied weight must not change for the layer that shares it."""
    return cell.model != "gemma2"


def _autocast(narrow: list[tuple[Cell, Outcome, Outcome | None]]) -> list[str]:
    lines = [
        "Under bfloat16 autocast (equal ranks, `mean`): error of the weights, forward error and",
        "share kept, beside the weight and folded into it:",
        "",
        "| model | base | beside: error | forward | kept | folded: error | forward | kept |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell, beside, fold in narrow:
        shown = " | ".join(
            f"{o.records[-1].certificate.error:.1e} | {_through([o])}" if o else "refused | | "
            for o in (beside, fold)
        )
        lines.append(f"| {NAMES[cell.model]} | {cell.dtype} | {shown} |")
    return [*lines, ""]


def _folding(folded: list[tuple[Cell, Outcome, Outcome]]) -> list[str]:
    lines = [
        "Error of all layers together if the remainder is folded into the narrow weight, and what",
        "averaging would lose (equal ranks, `mean`):",
        "",
        "| model | base | beside the weight | folded into it | averaging |",
        "|---|---|---:|---:|---:|",
    ]
    for cell, beside, fold in folded:
        errors = [o.records[-1].certificate.error for o in (beside, fold)]
        shown = " | ".join(f"{error:.1e}" for error in (*errors, beside.averaging))
        lines.append(f"| {NAMES[cell.model]} | {cell.dtype} | {shown} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
