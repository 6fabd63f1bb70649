"""Tables of a recipe that are handed on to another library's dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isfinite
from typing import Any

from pydantic import TypeAdapter, ValidationError


def option_faults(
    table: str,
    options: Mapping[str, Any],
    kind: type,
    reserved: Mapping[str, str],
    make: Callable[[], object],
    ranges: Callable[[Mapping[str, Any]], Iterable[str]] | None = None,
    types: Mapping[str, Any] | None = None,
    beside: Iterable[str] = (),
) -> list[str]:
    """Every fault of a table: keys that are reserved or unknown, or values that are refused.

    Dataclasses check no types: a value of another one would fail wherever it is first used, which
    may be after a round.

    Args:
        table: the table's name in the recipe.
        options: its content.
        kind: the dataclass whose fields it may set.
        reserved: fields that are set elsewhere, and where.
        make: builds the dataclass from the options; called if all keys and types are valid.
        ranges: faults of values of the right types, each beginning with its key.
        types: of fields whose annotation is not what the library takes.
        beside: what else the table may hold, and was checked: a misspelt key may be one of these.
    """
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    faults = []
    for key in options:
        if key in reserved:
            faults.append(f"{table}.{key}: not set here; {reserved[key]}")
        elif key not in known:
            near = difflib.get_close_matches(key, [*known, *beside], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            faults.append(f"{table}.{key}: {kind.__name__} has no such field{hint}")
    hints = {**typing.get_type_hints(kind), **(types or {})}
    given = {key: value for key, value in options.items() if key in known and key not in reserved}
    wrong = [fault for key, value in given.items() if (fault := _fault(value, hints[key], key))]
    faults += [f"{table}.{fault}" for fault in wrong or (ranges(given) if ranges else ())]
    if faults:
        return faults
    try:
        make()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        return [f"{table}: {error}"]
    return []


def _fault(value: object, annotation: Any, key: str) -> str | None:  # noqa: ANN401 - any type
    """Why a value is none that a field may have, or None."""
    if not all(isfinite(number) for number in _numbers(value)):
        return f"{key}: expected a finite number, found {value}"
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        return f"{key}: expected {wanted.replace('typing.', '')}, found {value!r}"
    return None


def _numbers(value: object) -> Iterator[float]:
    """The fractional numbers in a value of a TOML file."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(inner)
