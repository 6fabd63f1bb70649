"""E2E with a small GPT-2: a base of one half of the data set, which clients fine-tune on the other.

The paper's setting (``recipes/e2e.toml``: 3 clients, r 4, alpha 32, c_attn and every c_proj, label
smoothing; beam search) but for the model, which this machine makes itself, and ``COMMON``. Clients'
rows are drawn alike (IID), or each client has one kind of place: coffee shops, pubs, restaurants.
Scores are those after the last round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

from benchmarks.results.cell import Cell, Folders
from benchmarks.results.e2e_base import (
    FULL,
    PROMPTS,
    SMOKE,
    BaseRecipe,
    prepare_base,
    prepare_rows,
    rows_name,
)
from benchmarks.results.tables import by_seed, deviations, differences, table, with_spread

ROUNDS = 3
COMMON = (
    "data.max_train_rows=1500",
    f"federation.rounds={ROUNDS}",
    "training.num_train_epochs=1",
    "training.learning_rate=5e-3",
    "training.warmup_steps=0.1",
    "training.use_cpu=true",
    f"evaluation.every={ROUNDS}",
    "task.generation.max_new_tokens=50",
    "task.generation.num_beams=10",
    "task.generation.length_penalty=0.9",
    "task.generation.no_repeat_ngram_size=4",
    "task.generation.batch_size=10",
)
METRICS = {"e2e_bleu": 2, "nist": 3, "meteor": 2, "rouge_l": 2, "cider": 3}
"""Digits of each."""
NAMES = {
    "e2e_bleu": "BLEU",
    "nist": "NIST",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
RECIPES = {"IID": "e2e", "by kind": "../benchmarks/results/e2e_by_kind"}
METHODS = {"FedIT": "fedit", "FFA-LoRA": "ffa", "FedEx-LoRA": "fedex"}
WHOLE = {"rows": "all rows", "method": "centralised"}
SEEDS = (0, 1, 2)
PAIRS = (("centralised", "FedEx-LoRA"), ("FedEx-LoRA", "FedIT"), ("FedIT", "FFA-LoRA"))
"""The paper's order, better first."""


def prepare(folders: Folders, *, smoke: bool) -> None:
    """Make the rows and the base that the cells read, unless they are there."""
    rows = prepare_rows(folders.data, folders.work, _prompts(smoke))
    prepare_base(rows, folders.work, _base(smoke))


def cells(*, smoke: bool) -> list[Cell]:
    """Every run of the table; with ``smoke``, one small one."""
    sources = (
        f"data.source={{work}}/{rows_name(_prompts(smoke))}",
        f"model.source={{work}}/{_base(smoke).name}",
        f"task.generation.metrics=[{', '.join(map(repr, METRICS))}]",
    )
    found = [
        Cell(key | {"seed": seed}, recipe, (*sources, *COMMON, *own, _seed(seed)))
        for seed in SEEDS
        for key, recipe, own in _runs()
    ]
    if smoke:
        small = ("data.max_train_rows=150", "task.generation.max_new_tokens=20")
        return [replace(found[-1], settings=(*found[-1].settings, *small))]
    return found


def _runs() -> list[tuple[dict[str, str | int], str, tuple[str, ...]]]:
    """Key, recipe and own settings of each run of a seed."""
    return [
        (dict(WHOLE), RECIPES["IID"], ("partition.clients=1",)),
        *(
            ({"rows": rows, "method": name}, recipe, (f"method.name={method}",))
            for rows, recipe in RECIPES.items()
            for name, method in METHODS.items()
        ),
    ]


def _prompts(smoke: bool) -> int:
    return 20 if smoke else PROMPTS


def _base(smoke: bool) -> BaseRecipe:
    return SMOKE if smoke else FULL


def _seed(seed: int) -> str:
    return f"federation.seed={seed}"


def tables(records: Sequence[dict]) -> dict[str, str]:
    """Scores by method, the differences between neighbours in the paper's order, and deviations."""
    initial = [mean(x["initial_metrics"][name] for x in records) for name in METRICS]
    scores = [("base, before round 1", *map(_plain, initial, METRICS.values()))]
    scores += [(f"{key['method']}, {key['rows']}", *_scores(records, key)) for key, _, _ in _runs()]
    gains = [
        (f"{rows}: {better} - {other}", *_gains(records, _key(rows, better), _key(rows, other)))
        for rows in RECIPES
        for better, other in PAIRS
    ]
    columns = tuple(NAMES[name] for name in METRICS)
    return {
        "e2e": table(("method, rows", *columns), scores),
        "e2e-gains": table(("rows, pair", *columns), gains),
        "e2e-deviation": table(
            ("rows", *(f"round {i + 1}" for i in range(ROUNDS))),
            [(rows, *deviations(records, rows=rows, method="FedIT")) for rows in RECIPES],
        ),
    }


def _plain(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _key(rows: str, method: str) -> Mapping[str, str]:
    return WHOLE if method == WHOLE["method"] else {"rows": rows, "method": method}


def _scores(records: Sequence[dict], key: Mapping) -> list[str]:
    return [with_spread(by_seed(records, name, **key), digits) for name, digits in METRICS.items()]


def _gains(records: Sequence[dict], better: Mapping, other: Mapping) -> list[str]:
    """The mean difference with its spread, and in how many seeds the first one is better."""
    texts = []
    for name, digits in METRICS.items():
        each = differences(by_seed(records, name, **better), by_seed(records, name, **other))
        won = sum(x > 0 for x in each)
        texts.append(f"{with_spread(each, digits, sign=True)} ({won} of {len(each)})")
    return texts
