"""The records of a run, read from its file one at a time: thousands of rounds take no memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from fedexlora.exchange.records import RoundRecord


class RecordLines(Sequence[RoundRecord]):
    """The first lines of ``rounds.jsonl``; a last line that was cut off is none.

    Args:
        path: the file; it need not exist.
        count: the most lines that are read.

    Raises:
        ValueError: if a line is no record.
        OSError: if the file cannot be read.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        self._places: list[int] = []
        self.rounds: list[int] = []
        """What rounds the lines are of."""
        self.size = 0
        """Bytes of these lines."""
        if not path.exists():
            return
        with path.open("rb") as file:
            # Not splitlines: JSON may hold other characters that end a line.
            for line in file:
                if len(self._places) >= count or not line.endswith(b"\n"):
                    break
                self.rounds.append(RoundRecord.model_validate_json(line).round)
                self._places.append(self.size)
                self.size += len(line)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> RoundRecord: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[RoundRecord, ...]: ...

    def __getitem__(self, place: int | slice) -> RoundRecord | tuple[RoundRecord, ...]:
        if isinstance(place, slice):
            return tuple(self[i] for i in range(*place.indices(len(self))))
        start = self._places[place]
        with self._path.open("rb") as file:
            file.seek(start)
            return RoundRecord.model_validate_json(file.readline())
