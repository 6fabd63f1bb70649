"""Bytes as Flower's arrays, which know no bfloat16 and carry neither scalings nor checksums.

What is long goes in pieces of :data:`PIECE` bytes. Flower cuts every array into chunks of 5 MiB to
send it, and joins them again one array at a time: beside a message, it then holds one piece twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
from flwr.app import Array

PIECE = 256 * 2**20
"""The most bytes of one array; part of the protocol, as both sides must cut alike."""
_BEFORE = 4096
"""More than numpy writes before an array of bytes."""
_NUMPY = "numpy.ndarray"
"""Flower's name for numpy's format."""
_DTYPE = np.dtype(np.uint8)


def to_array(content: bytes | memoryview) -> Array:
    """``content`` as one uint8 array; it is copied once."""
    before = BytesIO()
    header = {"descr": _DTYPE.str, "fortran_order": False, "shape": (len(content),)}
    np.lib.format.write_array_header_1_0(before, header)
    data = b"".join((before.getvalue(), content))
    return Array(str(_DTYPE), (len(content),), _NUMPY, data)


def to_bytes(name: str, array: Array, most: int | None = None) -> bytes:
    """What :func:`to_array` took.

    Args:
        name: what messages call it.
        array: somebody else's.
        most: the bytes that it may have, held against it before it is read; any number by default.

    Raises:
        ValueError: if it is another array than one of bytes, none that can be read, or larger.
    """
    return bytes(_content(name, array, most))


def to_arrays(content: bytes) -> Iterator[Array]:
    """``content`` in pieces, of which all but the last have :data:`PIECE` bytes; one at least."""
    view = memoryview(content)
    for start in range(0, max(len(content), 1), PIECE):
        yield to_array(view[start : start + PIECE])


def pieces(size: int) -> int:
    """How many arrays :func:`to_arrays` makes of so many bytes."""
    return max(1, -(-size // PIECE))


def joined(name: str, arrays: Sequence[Array], size: int) -> bytes:
    """What :func:`to_arrays` took.

    Args:
        name: what messages call it.
        arrays: somebody else's, :func:`pieces` of them.
        size: the bytes that they hold together; no piece with more is read.

    Raises:
        ValueError: if one is another array than one of bytes, cannot be read, or has another length
            than its piece.
    """
    found = []
    for i, array in enumerate(arrays):
        length = min(PIECE, size - i * PIECE)
        piece = _content(f"{name}/{i}", array, length)
        if len(piece) != length:
            raise ValueError(f"'{name}/{i}': {len(piece)} bytes, expected {length}")
        found.append(piece)
    return b"".join(found)


def _content(name: str, array: Array, most: int | None) -> memoryview:
    """The bytes of an array, where they are.

    Raises:
        ValueError: as :func:`to_bytes` does.
    """
    if most is not None and len(array.data) > most + _BEFORE:
        raise ValueError(f"{name!r}: {len(array.data)} bytes, expected at most {most}")
    before = BytesIO(array.data[:_BEFORE])
    try:
        if array.stype != _NUMPY or np.lib.format.read_magic(before) != (1, 0):
            raise ValueError("another format than numpy's first")
        shape, _, dtype = np.lib.format.read_array_header_1_0(before)
    # Somebody else's bytes, which numpy reads in many ways, and quotes in what it says.
    except Exception as error:
        raise ValueError(f"{name!r} cannot be read: it is no array of numpy's") from error
    if dtype != _DTYPE or len(shape) != 1:
        raise ValueError(f"{name!r}: expected an array of bytes, found another one")
    content = memoryview(array.data)[before.tell() :]
    if shape[0] != len(content):
        raise ValueError(f"{name!r} cannot be read: {len(content)} bytes, not {shape[0]}")
    return content
