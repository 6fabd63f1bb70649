"""A recipe's file, with those that it extends and the values that a command line sets."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedexlora.data.config import LONGEST_CHAT_TEMPLATE
from fedexlora.errors import RecipeError

_EXTENDS = "extends"


def read_document(
    path: Path, overrides: Sequence[str] = (), over: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A recipe's content, not yet checked.

    ``extends = "FILE"``, beside the recipe, takes that recipe's values where this one gives none.
    A table of another ``kind``, or of another method, replaces the one that it extends; overrides
    that name another method do so too, whatever their order.

    Args:
        path: a TOML file.
        overrides: ``table.key=value``, the value in TOML or else taken as text.
        over: tables whose values go before those of the file, not before ``overrides``.

    Raises:
        RecipeError: if a file cannot be read or parsed, or extends itself, or an override is none.
    """
    document = _over(_read(path, ()), over or {})
    for override in sorted(overrides, key=lambda text: not text.startswith("method.name")):
        _set(document, override)
    _read_chat_template(document)
    return document


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """A file's content over what it extends; ``readers`` extend it."""
    if path.resolve() in readers:
        circle = " -> ".join(reader.name for reader in (*readers, path))
        raise RecipeError(f"recipe {readers[0]}: it extends itself: {circle}")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        by = f", which {readers[-1]} extends" if readers else ""
        raise RecipeError(f"recipe {path}{by}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not valid TOML: {error}") from error
    extended = document.pop(_EXTENDS, None)
    if extended is None:
        return document
    if not isinstance(extended, str):
        raise RecipeError(f"recipe {path}: {_EXTENDS}: expected a file, found {extended!r}")
    return _over(_read(path.parent / extended, (*readers, path.resolve())), document)


def _over(base: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``document`` in place of its own."""
    merged = dict(base)
    for key, value in document.items():
        held = base.get(key)
        if isinstance(held, dict) and isinstance(value, dict) and _same_kind(held, value):
            merged[key] = _over(held, value)
        else:
            merged[key] = value
    return merged


def _same_kind(held: Mapping[str, Any], table: Mapping[str, Any]) -> bool:
    """Whether two tables are of one kind of task or partition, or of one method."""
    return all(key not in table or table[key] == held.get(key) for key in ("kind", "name"))


def _read_chat_template(document: Mapping[str, Any]) -> None:
    """Put a template's text in the place of its file's name, which means nothing to other machines.

    Raises:
        RecipeError: if the file cannot be read.
    """
    task = document.get("task")
    named = task.get("chat_template") if isinstance(task, dict) else None
    if not isinstance(task, dict) or not isinstance(named, str) or not _names_template(named):
        return
    try:
        with Path(named).open(encoding="utf-8") as file:
            # one more than is allowed, so that a longer one is refused and not cut
            task["chat_template"] = file.read(LONGEST_CHAT_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"task.chat_template: {named} cannot be read: {reason}") from error


def _names_template(text: str) -> bool:
    return text.endswith(".jinja") and "\n" not in text and "{" not in text


def _set(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    tables = key.strip().split(".")
    if not equals or len(tables) < 2 or not all(tables):
        raise RecipeError(f"--set {override}: expected table.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = document
    for part in tables[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {part!r} is a value, not a table")
    if tables == ["method", "name"] and table.get("name") != value:
        table.clear()  # its options are those of another method
    table[tables[-1]] = value
