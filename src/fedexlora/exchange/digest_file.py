"""Safetensors files whose tensors are hashed as they pass: one is held at a time.

The header of such a file carries one JSON object with a checksum. That object has the digests which
the tensors are held against; what they are of is the affair of whoever writes the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fedexlora.exchange.digest import tensor_digest
from fedexlora.exchange.layout import not_finite
from fedexlora.exchange.tensors import TensorFile, TensorWriter
from fedexlora.exchange.untrusted import json_object
from fedexlora.exchange.wire import CHECKSUM, HEADER
from fedexlora.texts import few

_FIELDS, _HOLDER = 1024, 32
"""Bytes of a file's header: of all fields but one, and of one client beside its name."""


class DigestWriter:
    """Writes tensors to a file as they come, and hashes them.

    Args:
        path: the file; replaced if it exists.
        names: the tensors that may be added.
        room: bytes that the JSON object at the end may have.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path, names: Iterable[str], room: int) -> None:
        self._path = path
        # In the metadata of a file, which is JSON itself, every quotation mark has two characters.
        self._writer = TensorWriter(path, names, room=2 * room)

    def add(self, name: str, tensor: Tensor) -> str:
        """Write one tensor; returns its digest."""
        plain = tensor.detach().cpu().contiguous()
        self._writer.add(name, plain)
        return tensor_digest(name, plain)

    def finish(self, header: Mapping[str, Any]) -> None:
        """Write the header, and force the file to the disk."""
        text = json.dumps(header, sort_keys=True)
        self._writer.finish({HEADER: text, CHECKSUM: _checksum(text)})

    def abandon(self) -> None:
        """Close and remove the file."""
        with suppress(OSError):  # what could not be written cannot be flushed
            self._writer.abandon()
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class DigestFile:
    """One such file. It is opened for every read, so that nothing of it stays in memory."""

    file: TensorFile
    header: Mapping[str, Any]

    @staticmethod
    def open(path: Path) -> DigestFile:
        """Read the header of a file.

        Raises:
            ValueError: if it is no such file, is cut off, or its header is damaged.
            OSError: if it cannot be read.
        """
        file = TensorFile.open(path)
        text = file.metadata.get(HEADER)
        if text is None:
            raise ValueError(f"the file has no {HEADER!r} header")
        if file.metadata.get(CHECKSUM) != _checksum(text):
            raise ValueError("its header does not have the checksum that it was written with")
        return DigestFile(file, json_object(text))

    def tensors(
        self, wanted: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[str, Tensor, str]]:
        """Every tensor in the order of the file: its name, a copy, and its digest.

        Args:
            wanted: by name; others are passed over. All if not given.

        Raises:
            ValueError: if one cannot be read, or no model can be made of its numbers: raised after
                the last one, naming the first few.
        """
        faults = []
        for name in filter(wanted, self.file.tensors):
            try:
                tensor = self.file.read(name)
                faults += not_finite(name, tensor)
                digest = tensor_digest(name, tensor)
            # The format has dtypes and shapes that torch has no tensor for.
            except (SafetensorError, TypeError, RuntimeError) as error:
                raise ValueError(f"{name}: {error}") from error
            yield name, tensor, digest
        if faults:
            raise ValueError("; ".join(few(faults)))

    def digests(self) -> dict[str, str]:
        """The digest of every tensor; one of them is held at a time.

        Raises:
            ValueError: as :meth:`tensors` does.
        """
        return {name: digest for name, _, digest in self.tensors()}


def header_room(texts: Iterable[str]) -> int:
    """Bytes of a header that says something of every client.

    Args:
        texts: their names, one or two of each.
    """
    return _FIELDS + sum(len(json.dumps(text)) + _HOLDER for text in texts)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
