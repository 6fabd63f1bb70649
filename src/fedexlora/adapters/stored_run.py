"""A run that has ended, read from its folder."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import InputError, VersionError
from fedexlora.exchange.records import RoundRecord
from fedexlora.peft_bridge.adapter_file import AdapterFile, open_adapter
from fedexlora.peft_bridge.names import (
    INITIALISED_FROM_DATA,
    MUTATING,
    PREFIX,
    bias_owner,
    rank_and_scaling,
)
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.recipe import Recipe

_DEFAULTS = {"r": 8, "lora_alpha": 8}
"""PEFT's own, for a recipe that leaves them out."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a finished run left behind."""

    folder: RunFolder
    recipe: Recipe
    header: dict[str, Any]
    """The content of ``run.json``."""
    records: tuple[RoundRecord, ...]


def read_finished(path: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        InputError: if ``path`` holds no run, a damaged one, or one that has not ended.
    """
    folder = RunFolder(path)
    source = path / "recipe.toml"
    if not source.is_file():
        raise InputError(f"{path}: expected the folder of a run, found no recipe.toml")
    try:
        recipe = Recipe.model_validate(tomllib.loads(source.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise InputError(f"{source} cannot be read: {error}") from error
    records = folder.read_records(recipe.federation.rounds)
    header = folder.read_header()
    if header is None or len(records) < recipe.federation.rounds or not folder.adapter.is_dir():
        raise InputError(
            f"{path}: the run has not ended, round {len(records)} of {recipe.federation.rounds}",
            [f"finish it: fedexlora run {source} --out {path} --resume"],
        )
    return FinishedRun(folder, recipe, header, records)


def last_version(run: FinishedRun) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """What the run's last version makes of the untouched base, from the store.

    Returns:
        The scaled update ``(d_out, d_in)`` of every module, float64, and the heads and biases as
        they are applied. Where the initialisation changed the base, as PiSSA does, they are those
        of the run's own adapter, which was held against the live model when it was written.

    Raises:
        InputError: if it cannot be read.
    """
    initial = run.recipe.lora.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith((*MUTATING, *INITIALISED_FROM_DATA)):
        return _stored(open_adapter(run.folder.adapter))
    run.folder.check_layout()
    try:
        state = run.folder.store.state(run.recipe.federation.rounds)
    except VersionError as error:
        raise InputError(
            error.summary, [*error.faults, "an export is measured against the last version"]
        ) from error
    config = {**_DEFAULTS, **run.recipe.lora}
    scalings = {name: rank_and_scaling(config, name)[1] for name in state.adapter}
    updates = {
        name: total.to(torch.float64).plus([state.adapter[name].to(torch.float64)])
        for name, total in state.total.items()
    }
    dense = {
        name: tensor * (scalings[owner] if owner else 1.0)
        for name, tensor in state.dense.items()
        for owner in (bias_owner(name),)
    }
    return {name: update.scaled(scalings[name]) for name, update in updates.items()}, dense


def _stored(adapter: AdapterFile) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    updates = {
        name: LowRank(adapter.factors(name).to(torch.float64)).scaled(module.scaling)
        for name, module in adapter.modules.items()
    }
    dense = {
        name: adapter.rows(f"{PREFIX}{name}", 0, spec.shape[0] if spec.shape else 1)
        for name, spec in adapter.dense.items()
    }
    return updates, dense
