"""A run that has ended, read from its folder."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from fedexlora.errors import InputError, VersionError
from fedexlora.exchange.records import RoundRecord
from fedexlora.peft_bridge.adapter_file import AdapterFile, open_adapter
from fedexlora.peft_bridge.export_check import Terms
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
    records: Sequence[RoundRecord]


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
    if recipe.rule.personal:
        raise InputError(
            f"{path}: {recipe.method.name} has one model a client, and no global one",
            [f"the PEFT adapter of each client whose memory is here is in {folder.adapters}"],
        )
    records = folder.read_records(recipe.federation.rounds)
    header = folder.read_header()
    if header is None or not folder.has_ended(recipe):
        raise InputError(
            f"{path}: the run has not ended, round {len(records)} of {recipe.federation.rounds}",
            [f"finish it: fedexlora run {source} --out {path} --resume"],
        )
    return FinishedRun(folder, recipe, header, records)


@dataclass(frozen=True, slots=True)
class LastVersion:
    """What a run's last version makes of the untouched base."""

    modules: tuple[str, ...]
    terms: Callable[[str], Terms]
    """What a module's scaled update ``(M, N)`` is the sum of."""
    dense: Mapping[str, Tensor]
    """Heads and biases, as they are applied."""


def last_version(run: FinishedRun) -> LastVersion:
    """A run's last version, from the store.

    Where the initialisation changed the base, as PiSSA does, it is that of the run's own adapter,
    which was held against the live model when it was written.

    Raises:
        InputError: if it cannot be read.
    """
    initial = run.recipe.lora.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith((*MUTATING, *INITIALISED_FROM_DATA)):
        return _stored(open_adapter(run.folder.adapter))
    run.folder.check_layout()
    try:
        state = run.folder.store.state(len(run.records))
    except VersionError as error:
        raise InputError(
            error.summary, [*error.faults, "an export is measured against the last version"]
        ) from error
    except OSError as error:
        raise InputError(f"{run.folder.store.path} cannot be read: {error}") from error
    config = {**_DEFAULTS, **run.recipe.lora}
    scalings = {name: rank_and_scaling(config, name)[1] for name in state.adapter}

    def terms(name: str) -> Terms:
        yield state.total[name].value, scalings[name]
        yield state.adapter[name], scalings[name]

    dense = {
        name: tensor * (scalings[owner] if owner else 1.0)
        for name, tensor in state.dense.items()
        for owner in (bias_owner(name),)
    }
    return LastVersion(tuple(state.adapter), terms, dense)


def _stored(adapter: AdapterFile) -> LastVersion:
    dense = {
        name: adapter.rows(f"{PREFIX}{name}", 0, spec.shape[0] if spec.shape else 1)
        for name, spec in adapter.dense.items()
    }

    def terms(name: str) -> Terms:
        yield adapter.factors(name), adapter.modules[name].scaling

    return LastVersion(tuple(adapter.modules), terms, dense)
