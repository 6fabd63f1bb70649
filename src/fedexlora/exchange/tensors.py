"""Safetensors files larger than memory: tensors are read in pieces, and written one by one.

A file's header is read once. A tensor is read from its place, and the file is closed again: of
thousands of files none is open, and nothing of them is in memory but the places.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedexlora.exchange.spec import TensorSpec
from fedexlora.exchange.untrusted import tensor_names

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that are read and written, by the names that the format gives them."""
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}
"""The names that the format gives dtypes."""
_PIECE = 1 << 20
"""Numbers of a tensor that are held at a time."""


Value = TypeVar("Value")


class LazyMapping(Mapping[str, Value]):
    """What is read whenever it is asked for, and not held.

    Args:
        read: reads one value by its name.
        names: in order.
    """

    def __init__(self, read: Callable[[str], Value], names: Collection[str]) -> None:
        self._read, self._names = read, names

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One safetensors file."""

    path: Path
    tensors: Mapping[str, TensorSpec]
    """What it holds, in the order of the file."""
    metadata: Mapping[str, str]
    places: Mapping[str, int]
    """By tensor, where its bytes begin."""

    @staticmethod
    def open(path: Path) -> TensorFile:
        """Read the header of a file.

        Raises:
            ValueError: if it is no safetensors file, is cut off, or holds a dtype that is not
                supported or a name that no tensor has.
            OSError: if it cannot be read.
        """
        with path.open("rb"):  # a missing or unreadable file, by the system's own error
            pass
        try:
            with safe_open(path, framework="pt") as file:
                found = {}
                tensor_names(file.keys())
                for name in file.offset_keys():
                    part = file.get_slice(name)
                    found[name] = TensorSpec(tuple(part.get_shape()), _dtype(part.get_dtype()))
                metadata = file.metadata() or {}
            return TensorFile(path, found, metadata, _places(path))
        except SafetensorError as error:
            raise ValueError(f"not a whole safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        """One tensor, as a copy.

        Raises:
            KeyError: if the file has no such tensor.
        """
        spec = self.tensors[name]
        return self._read(spec.dtype, spec.shape, self.places[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor, as a copy."""
        spec = self.tensors[name]
        width = prod(spec.shape[1:])
        start, stop, _ = slice(start, stop).indices(spec.shape[0])
        place = self.places[name] + start * width * spec.dtype.itemsize
        return self._read(spec.dtype, (max(0, stop - start), *spec.shape[1:]), place)

    def _read(self, dtype: torch.dtype, shape: tuple[int, ...], place: int) -> Tensor:
        """Numbers that lie together, in memory that torch has aligned.

        Raises:
            ValueError: if the file has become shorter.
            OSError: if it cannot be read.
        """
        found = torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default device is
        if not found.numel():
            return found
        into = found.reshape(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(place)
            read = 0
            while read < len(into):
                more = file.readinto(into[read:])
                if not more:
                    raise ValueError(f"{self.path} has become shorter")
                read += more
        return found


def _places(path: Path) -> dict[str, int]:
    """Where the bytes of every tensor of a whole safetensors file begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}


def pieces(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Ranges of rows, from the first to the last, that are small enough to be held."""
    rows = spec.shape[0] if spec.shape else 1
    step = max(1, _PIECE // max(1, prod(spec.shape[1:])))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class TensorWriter:
    """Writes tensors to a safetensors file as they come.

    The format wants the header first: its space is reserved, and it is filled in at the end.

    Args:
        path: the file; replaced if it exists.
        names: the tensors that may be added.
        metadata: written to the header.
        room: bytes that are kept free for metadata that is known at the end only.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        names: Iterable[str],
        metadata: Mapping[str, str] | None = None,
        *,
        room: int = 0,
    ) -> None:
        self._header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
        entry = {"dtype": "BF16", "shape": [10**12] * 8, "data_offsets": [10**18, 10**18]}
        most = json.dumps({**self._header, **dict.fromkeys(names, entry)})
        self._reserved = -(-(len(most.encode()) + room) // 8) * 8
        self._offset = 0
        self._file = path.open("wb")
        self._file.seek(8 + self._reserved)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._close()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Fill in the header, and force the file to the disk.

        Args:
            metadata: takes the place of what was given at the beginning.
        """
        self._header["__metadata__"] = dict(metadata)
        with self._file:
            self._close()
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Close the file as it is: without a header, it is none."""
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        self.add_pieces(name, TensorSpec.of(tensor), [tensor])

    def add_pieces(self, name: str, spec: TensorSpec, rows: Iterable[Tensor]) -> None:
        """Write one tensor of shape and dtype ``spec`` from consecutive groups of its rows."""
        start = self._offset
        for piece in rows:
            plain = piece.detach().cpu().to(spec.dtype).contiguous()
            # A view of bytes also of dtypes that numpy does not have.
            self._offset += self._file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
        size = prod(spec.shape) * spec.dtype.itemsize
        if self._offset - start != size:
            raise AssertionError(f"{name}: {self._offset - start} bytes of {size} were written")
        self._header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, self._offset],
        }

    def _close(self) -> None:
        content = json.dumps(self._header).encode()
        if len(content) > self._reserved:
            raise AssertionError(f"a header of {len(content)} bytes in {self._reserved}")
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little"))
        self._file.write(content.ljust(self._reserved))


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"a tensor of dtype {name}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
