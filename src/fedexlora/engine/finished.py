"""A run that has ended, read from its folder."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedexlora.engine.folder import RunFolder
from fedexlora.engine.recipe import Recipe
from fedexlora.errors import InputError
from fedexlora.exchange.records import RoundRecord


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
