"""Tiny federations whose records are the same on every machine.

They go through the whole engine but for the training itself, which a stand-in replaces: factors
start as fractions of 512, and step by such fractions that depend on nothing but the client's seed.
Drawn or trained as usual they would differ between processors, since vectors of another width round
otherwise. What is left of that is in sums of float64, and in what forward passes say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from torch import Tensor, nn

from fedexlora.local.job import JobResult, LocalJob
from fedexlora.rounds.recipe import Recipe, parse_recipe
from fedexlora.rounds.run import run
from tests.conftest import save_bert, save_gpt2
from tests.golden.figures import directions
from tests.rounds.conftest import recipe_document, records_without_times, save_rows

Document = dict[str, Any]
GPT2: Document = {
    "task": {"kind": "causal-lm", "text": "text", "max_length": 16},
    "lora": {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc"]},
}
"""Conv1D layers, whose weights are stored as columns by rows."""
RANKS: Document = {
    "site-south": {"lora": {"r": 4, "lora_alpha": 5}},
    "site-west": {"lora": {"r": 1, "use_rslora": True}},
}
FEDERATIONS: dict[str, tuple[str, Document]] = {
    "mean": ("bert", {}),
    "mean-conv1d": ("gpt2", GPT2),
    "mean-side-conv1d": ("gpt2", GPT2 | {"federation": {"placement": "side"}}),
    "mean-ranks-conv1d": ("gpt2", GPT2 | {"clients": RANKS}),
    "mean-some": ("bert", {"federation": {"clients_per_round": 2, "rounds": 6, "history": 2}}),
    "mean-clipped-conv1d": (
        "gpt2",
        GPT2 | {"lora": GPT2["lora"] | {"r": 2}, "federation": {"robust": "clip"}},
    ),
    "mean-bfloat16": ("bert", {"model": {"dtype": "bfloat16"}}),
    "svd-aligned": ("bert", {"method": {"next_adapter": "svd_aligned"}}),
    "svd-aligned-ranks-conv1d": (
        "gpt2",
        GPT2
        | {
            "clients": RANKS,
            "method": {"next_adapter": "svd_aligned"},
            "federation": {"placement": "side"},
        },
    ),
    "keep-some": (
        "bert",
        {"method": {"next_adapter": "keep"}, "federation": {"clients_per_round": 2, "rounds": 4}},
    ),
    "reinit": ("bert", {"method": {"next_adapter": "reinit"}}),
    "truncated": ("bert", {"method": {"remainder_rank": 1}}),
    "fedit": ("bert", {"method": {"name": "fedit"}}),
    "ffa": ("bert", {"method": {"name": "ffa"}}),
}
"""By name: the base, and how the recipe differs from that of `tests.rounds`.

Rounds whose co-moment is dense, and heads, are left out where a figure depends on them: they are
sums in float32, whose last bits are the processor's own.
"""


class Bases:
    """The bases and rows of all federations, made in a folder."""

    def __init__(self, folder: Path) -> None:
        for name in ("bert", "gpt2", "rows"):
            (folder / name).mkdir()
        self._sources = {"bert": save_bert(folder / "bert"), "gpt2": save_gpt2(folder / "gpt2")}
        self._rows = save_rows(folder / "rows")

    def recipe(self, name: str) -> Recipe:
        """The recipe of a federation."""
        base, changes = FEDERATIONS[name]
        document = recipe_document(self._sources[base], self._rows)
        for table, values in changes.items():
            replaced = table in ("task", "lora")
            document[table] = values if replaced else document.get(table, {}) | values
        return parse_recipe(document, name)


def play(recipe: Recipe) -> Document:
    """A run's figures: its records, and what its adapter adds to the base in some directions."""
    with tempfile.TemporaryDirectory() as folder, stand_in():
        out = Path(folder) / "run"
        run(recipe, out)
        return {"rounds": records_without_times(out), "adapter": directions(out / "adapter")}


@contextmanager
def stand_in() -> Iterator[None]:
    """New factors and what clients train are fractions of 512."""
    with (
        patch("fedexlora.local.trainer.TrainerJob.train", _step),
        patch("torch.nn.init.kaiming_uniform_", _start),
    ):
        yield


@torch.no_grad()
def _start(parameter: Tensor, **_: object) -> Tensor:
    """What PEFT draws a new A with."""
    return parameter.copy_(torch.randint(-128, 129, parameter.shape) / 512)


@torch.no_grad()
def _step(_job: LocalJob, model: nn.Module, rows: Dataset, *, seed: int, **_: object) -> JobResult:
    """Move every trained parameter; the loss is one that nobody could take for another client's."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            step = torch.randint(-64, 65, parameter.shape, generator=generator)
            parameter.add_((step / 512).to(parameter.dtype))
    return JobResult(1.0 / len(rows), 1, len(rows))
