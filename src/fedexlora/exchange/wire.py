"""Messages as bytes: a safetensors file whose header also carries one JSON object and a checksum.

bfloat16 and every other dtype travel as they are, bit for bit; nothing is pickled. The checksum
covers tensors and header, so that a file edited by hand is noticed as surely as a damaged one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedexlora.exchange.tensors import DTYPE_NAMES
from fedexlora.exchange.untrusted import json_object

HEADER = "fedexlora"
"""The key of the JSON object in a file's metadata."""
CHECKSUM = "sha256"
"""The key of the checksum."""


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """Tensors and a JSON object in one message.

    Args:
        tensors: by name; their device does not travel.
        header: anything that JSON holds.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    metadata = {HEADER: text, CHECKSUM: digest(ready, text)}
    return bytes(safetensors.torch.save(ready, metadata))


def packed_size(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    """The bytes of what :func:`pack` would make, from names, shapes and dtypes alone.

    Args:
        tensors: by name; they may be on torch's meta device.
        header: as of :func:`pack`.

    >>> tensors = {"A/q": torch.ones(2, 3), "B/q": torch.ones(5, 2, dtype=torch.bfloat16)}
    >>> packed_size(tensors, {"round": 1}) == len(pack(tensors, {"round": 1}))
    True
    """
    text = json.dumps(header, sort_keys=True)
    layout: dict[str, object] = {"__metadata__": {HEADER: text, CHECKSUM: "0" * 64}}
    end = 0
    # As safetensors lays them out: wide ones first, then by name.
    for name, tensor in sorted(tensors.items(), key=lambda x: (-x[1].element_size(), x[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPE_NAMES[tensor.dtype]
        layout[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    first = len(json.dumps(layout, ensure_ascii=False, separators=(",", ":")).encode())
    return 8 + -(-first // 8) * 8 + end


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
    if HEADER not in metadata:
        raise ValueError(f"the message has no {HEADER!r} header")
    if metadata.get(CHECKSUM) != digest(tensors, metadata[HEADER]):
        raise ValueError("its content does not have the checksum that it was written with")
    header = json_object(metadata[HEADER])
    # Views of the message start at any address, and matrix products may differ in last bits with
    # the alignment of their inputs; torch aligns what it allocates.
    return {name: tensor.clone() for name, tensor in tensors.items()}, header


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
