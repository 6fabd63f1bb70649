"""Tables of a recipe that are handed on to another library's dataclass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any


def option_faults(
    table: str,
    options: Mapping[str, Any],
    kind: type,
    reserved: Mapping[str, str],
    make: Callable[[], object],
) -> list[str]:
    """Every fault of a table: keys that are reserved or unknown, or values that are refused.

    Args:
        table: the table's name in the recipe.
        options: its content.
        kind: the dataclass whose fields it may set.
        reserved: fields that are set elsewhere, and where.
        make: builds the dataclass from the options; called if all keys are valid.
    """
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    faults = []
    for key in options:
        if key in reserved:
            faults.append(f"{table}.{key}: not set here; {reserved[key]}")
        elif key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            faults.append(f"{table}.{key}: {kind.__name__} has no such field{hint}")
    if faults:
        return faults
    try:
        make()
    except (ValueError, TypeError, ImportError) as error:
        return [f"{table}: {error}"]
    return []
