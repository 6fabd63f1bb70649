"""What a comparison looks like on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fedexlora.cli.tables import print_blocks, print_entry
from fedexlora.cli.text import plain
from fedexlora.exchange.comparison_records import ArmRecord, ComparisonRecord, StatisticRecord
from fedexlora.texts import size


def print_comparison(console: Console, record: ComparisonRecord, path: Path) -> None:
    """The table of the arms, from what runs started, and what is missing.

    Args:
        console: where to.
        record: the comparison.
        path: of its file.
    """
    header = [
        "method",
        record.headline,
        f"against\n{record.baseline}",
        "seeds",
        "MB up",
        "MB down",
        "seconds",
        f"within\n{size(record.budget or 0)}",
    ]
    if record.target is not None:
        header += [f"rounds to\n{record.target:g}", "MB to it", "seconds\nto it"]
    rows = [_row(arm, record) for arm in record.arms]
    print_blocks(console, f"{record.headline} after {record.rounds} rounds", header, rows)
    print_entry(console, "±", "the standard deviation over seeds, where there are several")
    interval = f"{record.confidence:.0%} bootstrap interval of the mean difference"
    print_entry(console, "\\[low, high]", f"{interval}, paired by seed")
    for label, text in _starts(record):
        print_entry(console, label, text)
    for cell in record.cells:
        if cell.hole is not None:
            hole = f"{plain(cell.arm)}, seed {cell.seed}: {plain(cell.hole)}"
            print_entry(console, "[yellow]hole[/]", hole)
    console.print(f"comparison   [bold]{plain(path)}[/]", soft_wrap=True)


def _row(arm: ArmRecord, record: ComparisonRecord) -> list[str]:
    row = [
        arm.arm,
        _text(arm.scores.get(record.headline), "{:.4f}"),
        _against(arm, record),
        str(len(arm.seeds)),
        _text(arm.bytes_up, "{:.2f}", 1e-6),
        _text(arm.bytes_down, "{:.2f}", 1e-6),
        _text(arm.seconds, "{:.0f}"),
        _text(arm.within_budget, "{:.4f}"),
    ]
    if (found := arm.target) is not None:
        row += [
            _text(found.rounds, "{:.1f}"),
            _text(found.bytes, "{:.2f}", 1e-6),
            _text(found.seconds, "{:.0f}"),
        ]
        if 0 < found.reached < len(arm.seeds):
            row[-3] += f"\n{found.reached} of {len(arm.seeds)}"
    return row


def _against(arm: ArmRecord, record: ComparisonRecord) -> str:
    found = arm.differences.get(record.headline)
    if found is None:
        return ""
    ends = "" if found.low is None else f"\n[{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.mean:+.4f}{ends}"


def _text(found: StatisticRecord | None, form: str, unit: float = 1.0) -> str:
    if found is None:
        return ""
    spread = "" if found.deviation is None else f" ± {form.format(unit * found.deviation)}"
    return form.format(unit * found.mean) + spread


def _starts(record: ComparisonRecord) -> list[tuple[str, str]]:
    """Whether the methods of one seed started from the same."""
    if not record.same_start:
        return []
    odd = [x for x in record.same_start if x.differences]
    if not odd:
        seeds = ", ".join(str(x.seed) for x in record.same_start)
        return [
            (
                "start",
                (
                    "[green]the same[/] rows, clients, order and initial adapter for all methods "
                    f"of one seed, by the runs' headers (seeds {seeds})"
                ),
            )
        ]
    return [
        ("start", f"[yellow]not the same[/] for seed {x.seed}: {plain('; '.join(x.differences))}")
        for x in odd
    ]
