"""JSON that somebody else wrote: what is not of the expected kind or size is refused by name."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from fedexlora.texts import cut

LARGEST = 2**53
"""The largest number of rounds or examples: up to here, floating point holds whole numbers."""
CLIENT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a client may call itself: a name that is safe as part of a file's."""
_LONGEST = 160
_LONGEST_NAME = 1000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _LONGEST
_SHORT.maxlevel = 2


def json_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {short(found)}")
    return found


def number(header: Mapping[str, Any], key: str) -> int:
    """A number of rounds or examples of a header.

    Raises:
        ValueError: if it is missing or anything but a whole number that is not negative.
    """
    found = header.get(key)
    if type(found) is not int or not 0 <= found <= LARGEST:
        raise ValueError(f"header {key!r}: expected a whole number, found {short(found)}")
    return found


def seconds(header: Mapping[str, Any], key: str) -> float:
    """A duration of a header.

    Raises:
        ValueError: if it is missing or anything but a number of seconds that can be counted.
    """
    found = header.get(key)
    if isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found <= LARGEST:
        return float(found)  # NaN is not within the bounds, either
    raise ValueError(f"header {key!r}: expected seconds, found {short(found)}")


def client_name(header: Mapping[str, Any], key: str) -> str:
    """The name of a client of a header.

    Raises:
        ValueError: if it is missing or anything but letters, digits, ``.``, ``_`` and ``-``.
    """
    found = header.get(key)
    if not isinstance(found, str) or not re.fullmatch(CLIENT_NAME, found):
        raise ValueError(f"header {key!r}: expected a client's name, found {short(found)}")
    return found


def tensor_names(names: Iterable[str]) -> None:
    """Refuse names of tensors that no module of a model has.

    Raises:
        ValueError: saying how many there are, and the first.
    """
    odd = [name for name in names if len(name) > _LONGEST_NAME or not name.isprintable()]
    if odd:
        raise ValueError(
            f"{len(odd)} name(s) of tensors that are too long or hold characters that cannot be "
            f"shown, as {short(odd[0])}"
        )


def short(value: object) -> str:
    """``repr`` of what somebody else sent, of bounded length and depth."""
    return cut(_SHORT.repr(value), _LONGEST)
