"""A step as it is made, one module after the other: in memory, or as a file.

    sink.add("layer.q", adapter, piece, memory)  module by module
    sink.finish(dense, own, digests, held)       the step; its id is the same from both sinks

The file is the tensors of the step in the order in which they came, and a header with the version
that the step leads to, its id, the id of the version before, the digests of the step's parts, and
what the round changed of what clients hold. What the server remembers of a module for the next
round is in the file as well; it is no part of the step, and never sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.digest import group, tensors_digest
from fedexlora.exchange.digest_file import DigestWriter, header_room
from fedexlora.exchange.files import writing
from fedexlora.exchange.layout import (
    MEMORY,
    MEMORY_PARTS,
    NO_MEMORY,
    adapter_tensors,
    dense_tensors,
    each_once,
    lowrank_tensors,
    memory_tensors,
    own_tensors,
)
from fedexlora.exchange.step import PIECE, Step, StepDigests, remainder_digest
from fedexlora.exchange.step_file import PREFIX, open_step
from fedexlora.exchange.version import Adapter, next_id


class StepSink(Protocol):
    """What takes in a step while it is made."""

    def add(
        self,
        module: str,
        adapter: Factors,
        piece: LowRank,
        memory: Mapping[str, Tensor] = NO_MEMORY,
    ) -> None:
        """Take in one module.

        Args:
            module: its name; each comes once.
            adapter: its factors in the version that is reached.
            piece: its remainder of the round, unscaled, ``(d_out, d_in)``; rounded to float32. Of
                a zero matrix nothing is kept.
            memory: what the server remembers of the module, by part of ``MEMORY_PARTS``.

        Raises:
            RunError: if it cannot be written.
        """

    def finish(
        self,
        dense: Mapping[str, Tensor],
        own: Mapping[str, Adapter],
        own_digests: Mapping[str, str],
        held: Mapping[str, int | None],
    ) -> Step:
        """The step of all modules that were added.

        Args:
            dense: heads and biases of the version that is reached, by name.
            own: by client, the adapters of those of their own that change. What is one object is
                kept once.
            own_digests: of all clients' own adapters in the version that is reached.
            held: by client whose holding the round changed, the version; None for nothing.

        Raises:
            RunError: if it cannot be written.
        """

    def close(self) -> None:
        """Remove what is there of a step that was not finished."""


class StepBuilder:
    """Makes a step in memory.

    Args:
        version: the version that it leads to.
        previous: the id of the version before.
        letters: the factors that the step changes, of ``("A", "B")``.
    """

    def __init__(self, version: int, previous: str, letters: Sequence[str]) -> None:
        self._version, self._previous, self._letters = version, previous, letters
        self._factors: dict[str, Tensor] = {}
        self._pieces: dict[str, LowRank] = {}
        self.memory: dict[str, Mapping[str, Tensor]] = {}
        """What the server remembers, by module."""

    def add(
        self,
        module: str,
        adapter: Factors,
        piece: LowRank,
        memory: Mapping[str, Tensor] = NO_MEMORY,
    ) -> None:
        """See :class:`StepSink`."""
        self._factors |= adapter_tensors({module: adapter}, self._letters)
        self.memory[module] = memory
        if not piece.is_zero:
            self._pieces[module] = _rounded(piece)

    def finish(
        self,
        dense: Mapping[str, Tensor],
        own: Mapping[str, Adapter],
        own_digests: Mapping[str, str],
        held: Mapping[str, int | None],
    ) -> Step:
        """See :class:`StepSink`; what clients hold is no part of a step."""
        del held
        digests = StepDigests(
            tensors_digest(self._factors),
            tensors_digest(dense_tensors(dense)),
            group(own_digests),
            remainder_digest(self._pieces),
        )
        kept, shared = each_once(own)
        return Step(
            self._version,
            self._previous,
            self._factors,
            dict(dense),
            self._pieces,
            digests,
            kept,
            shared,
        )

    def close(self) -> None:
        """Nothing has to be removed."""


class StepWriter:
    """Writes a step to a file; one module is held at a time.

    Args:
        path: the file; replaced if it exists, and removed if the step is not finished.
        version: the version that the step leads to.
        previous: the id of the version before.
        letters: the factors that the step changes, of ``("A", "B")``.
        modules: the modules that may be added.
        dense: names of the heads and biases.
        owners: by client whose own adapter may change, the first one that has the same.
        clients: those of which the round may change what they hold.

    Raises:
        RunError: if the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        previous: str,
        letters: Sequence[str],
        modules: Iterable[str],
        dense: Iterable[str] = (),
        owners: Mapping[str, str] | None = None,
        clients: Iterable[str] = (),
    ) -> None:
        self._path, self._version = path, version
        self._previous, self._letters = previous, letters
        self._adapter: dict[str, str] = {}
        self._remainder: dict[str, str] = {}
        self._memory: dict[str, str] = {}
        known, first = list(modules), dict(owners or {})
        names = [f"{letter}/{name}" for name in known for letter in letters]
        names += [f"{PREFIX}.{letter}/{name}" for name in known for letter in "AB"]
        names += [f"{MEMORY}.{part}/{name}" for name in known for part in MEMORY_PARTS]
        names += [f"dense/{name}" for name in dense]
        owning = set(first.values())
        names += [f"own.{x}/{name}/{client}" for name in known for client in owning for x in "AB"]
        said = [*clients, *(f"{client}{name}" for client, name in first.items())]
        with writing(path):
            self._file: DigestWriter | None = DigestWriter(path, names, header_room(said))

    def add(
        self,
        module: str,
        adapter: Factors,
        piece: LowRank,
        memory: Mapping[str, Tensor] = NO_MEMORY,
    ) -> None:
        """See :class:`StepSink`."""
        with self._open() as file:
            for name, tensor in adapter_tensors({module: adapter}, self._letters).items():
                self._adapter[name] = file.add(name, tensor)
            for name, tensor in memory_tensors(module, memory).items():
                self._memory[name] = file.add(name, tensor)
            if not piece.is_zero:
                tensors = lowrank_tensors(PREFIX, {module: _rounded(piece)})
                digests = {name: file.add(name, tensor) for name, tensor in tensors.items()}
                self._remainder[module] = group(digests)

    def finish(
        self,
        dense: Mapping[str, Tensor],
        own: Mapping[str, Adapter],
        own_digests: Mapping[str, str],
        held: Mapping[str, int | None],
    ) -> Step:
        """See :class:`StepSink`; the step reads what it is asked for from the file."""
        with self._open() as file:
            heads = {n: file.add(n, tensor) for n, tensor in dense_tensors(dense).items()}
            kept, shared = each_once(own)
            for name, tensor in own_tensors(kept).items():
                file.add(name, tensor)
            parts = group(self._adapter), group(heads), group(own_digests), group(self._remainder)
            digests = StepDigests(*parts)
            header = {
                "version": self._version,
                "id": next_id(self._previous, digests.whole),
                "previous": self._previous,
                "digests": digests.to_json(),
                "held": dict(held),
                "shared": shared,
                "memory": group(self._memory),
            }
            file.finish(header)
            self._file = None
        return open_step(self._path).step

    def close(self) -> None:
        """See :class:`StepSink`."""
        if self._file is not None:
            self._file.abandon()
            self._file = None

    @contextmanager
    def _open(self) -> Iterator[DigestWriter]:
        """The file; it is removed if it cannot be written."""
        if self._file is None:
            raise ValueError(f"{self._path}: the step is finished")
        try:
            with writing(self._path):
                yield self._file
        except BaseException:
            self.close()
            raise


def _rounded(piece: LowRank) -> LowRank:
    """A piece in float32, laid out as it is read from a file: sums may depend on that."""
    value = piece.to(PIECE).value
    if isinstance(value, Factors):
        return LowRank(Factors(value.A.contiguous(), value.B.contiguous()))
    return LowRank(value.contiguous())
