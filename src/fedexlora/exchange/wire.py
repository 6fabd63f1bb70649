"""Messages as bytes: a safetensors file whose header also carries one JSON object and a checksum.

bfloat16 and every other dtype travel as they are, bit for bit; nothing is pickled. The checksum
covers tensors and header, so that a file edited by hand is noticed as surely as a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_KEY = "fedexlora"
_CHECKSUM = "sha256"
LARGEST = 2**53
"""The largest number of rounds or examples: up to here, floating point holds whole numbers."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """Tensors and a JSON object in one message.

    Args:
        tensors: by name; their device does not travel.
        header: anything that JSON holds.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    metadata = {_KEY: text, _CHECKSUM: digest(ready, text)}
    return bytes(safetensors.torch.save(ready, metadata))


def unpack(message: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON object of a message made by :func:`pack`.

    Raises:
        ValueError: if the message is truncated, damaged or made by something else.
    """
    try:
        tensors = safetensors.torch.load(message)
    # The format has dtypes and shapes that torch has no tensor for.
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a safetensors message: {error}") from error
    size = int.from_bytes(message[:8], "little")
    metadata = json_object(message[8 : 8 + size]).get("__metadata__") or {}
    if _KEY not in metadata:
        raise ValueError(f"the message has no {_KEY!r} header")
    if metadata.get(_CHECKSUM) != digest(tensors, metadata[_KEY]):
        raise ValueError("its content does not have the checksum that it was written with")
    header = json_object(metadata[_KEY])
    # Views of the message start at any address, and matrix products may differ in last bits with
    # the alignment of their inputs; torch aligns what it allocates.
    return {name: tensor.clone() for name, tensor in tensors.items()}, header


def json_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object from a source that is not trusted.

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
    """A version number of a header.

    Raises:
        ValueError: if it is missing or anything but a whole number that is not negative.
    """
    found = header.get(key)
    if type(found) is not int or not 0 <= found <= LARGEST:
        raise ValueError(f"header {key!r}: expected a whole number, found {short(found)}")
    return found


def short(value: object) -> str:
    """``repr`` of what somebody else sent, of bounded length and depth."""
    return _SHORT.repr(value)


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over names, dtypes, shapes and bits of tensors, in the order of their names.

    Args:
        tensors: by name; their device and memory layout do not matter.
        text: goes first.
    """
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
