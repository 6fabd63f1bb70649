"""Bytes as Flower's arrays, which know no bfloat16 and carry neither scalings nor checksums."""

from __future__ import annotations

import numpy as np
from flwr.app import Array


def to_array(content: bytes) -> Array:
    """``content`` as one uint8 array."""
    return Array(np.frombuffer(content, dtype=np.uint8))


def to_bytes(name: str, array: Array) -> bytes:
    """What :func:`to_array` took.

    Raises:
        ValueError: if it is another array than one of bytes, or none that can be read.
    """
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
