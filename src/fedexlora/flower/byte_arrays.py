"""Bytes as Flower's arrays, which know no bfloat16 and carry neither scalings nor checksums."""

from __future__ import annotations

import numpy as np
from flwr.app import Array

_BEFORE = 4096
"""More than numpy writes before an array of bytes."""


def to_array(content: bytes) -> Array:
    """``content`` as one uint8 array."""
    return Array(np.frombuffer(content, dtype=np.uint8))


def to_bytes(name: str, array: Array, most: int | None = None) -> bytes:
    """What :func:`to_array` took.

    Args:
        name: what messages call it.
        array: somebody else's.
        most: the bytes that it may have, held against it before it is read; any number by default.

    Raises:
        ValueError: if it is another array than one of bytes, none that can be read, or larger.
    """
    if most is not None and len(array.data) > most + _BEFORE:
        raise ValueError(f"{name!r}: {len(array.data)} bytes, expected at most {most}")
    try:
        values = array.numpy()
    except Exception as error:  # somebody else's bytes, and numpy has many formats
        raise ValueError(f"{name!r} cannot be read: {error}") from error
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{name!r}: expected uint8 [bytes], found an archive")
    if values.dtype != np.uint8 or values.ndim != 1:
        found = f"{values.dtype} {list(values.shape)}"
        raise ValueError(f"{name!r}: expected uint8 [bytes], found {found}")
    return values.tobytes()
