"""What clients remember of a method from one round to a later one: files, by client and round.

    CLIENT/round-0003.safetensors    what the client remembered on leaving round 3

The last two rounds in which a client took part are kept, so that a round which is asked again, or
run again after a restart, starts from what preceded it.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from fedexlora.exchange.files import replace_bytes
from fedexlora.exchange.untrusted import number
from fedexlora.exchange.wire import pack, unpack
from fedexlora.methods.rule import Memory

_KEPT = 2
_NAME = re.compile(r"round-([0-9]{4,9})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a client remembers, and since when."""

    round: int = 0
    """The round that it is of; 0 if there is nothing."""
    tensors: Memory = field(default_factory=dict)


class ClientMemory:
    """The memory of one run's clients, or of one client.

    Args:
        path: the folder; made when something is remembered.
        run: what tells the run from others; the memory of another one is passed over.
    """

    def __init__(self, path: Path, run: str = "") -> None:
        self._path = path
        self._run = run

    def read(self, client: str, before: int) -> Remembered:
        """What a client remembered last before a round.

        What cannot be read, or is of another run, counts as forgotten, with a line in the log.

        Args:
            client: the client.
            before: the round, from 1.
        """
        rounds = [found for found in self._rounds(client) if found < before]
        if not rounds:
            return Remembered()
        path = self._file(client, rounds[-1])
        try:
            tensors, header = unpack(path.read_bytes())
            if (header["run"], header["client"]) != (self._run, client):
                _log.warning("%s is of another run, and is passed over", path)
                return Remembered()
            if number(header, "round") != rounds[-1]:
                raise ValueError(f"it is one of round {number(header, 'round')}")
        except (OSError, ValueError, KeyError) as error:
            _log.warning("%s cannot be read: %s starts anew: %s", path, client, error)
            return Remembered()
        return Remembered(rounds[-1], tensors)

    def write(self, client: str, round_: int, memory: Memory) -> None:
        """Remember something of a round; of older ones, only the last is kept.

        Raises:
            OSError: if it cannot be written.
        """
        path = self._file(client, round_)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"run": self._run, "client": client, "round": round_}
        replace_bytes(path, pack(memory, header))
        kept = [found for found in self._rounds(client) if found <= round_][-_KEPT:]
        for found in self._rounds(client):
            if found not in kept:
                self._file(client, found).unlink()

    def clients(self) -> list[str]:
        """The clients that remember anything."""
        return sorted(found.name for found in self._path.glob("*") if found.is_dir())

    def _rounds(self, client: str) -> list[int]:
        names = (_NAME.fullmatch(x.stem) for x in (self._path / client).glob("*.safetensors"))
        return sorted(int(name[1]) for name in names if name)

    def _file(self, client: str, round_: int) -> Path:
        return self._path / client / f"round-{round_:04d}.safetensors"
