"""The updates of the round that is open, on disk: one file a client.

    spool/draw.json              who takes part, before anyone is asked
    spool/CLIENT.safetensors     what the client sent, in the common form, and its record

Files are written beside and renamed. A server that is killed in the middle of a round goes on with
what is here: the draw stands, and only those are asked again of whom there is no file. Files are
opened for every read, and their places are read once, so that neither descriptors nor memory grow
with the clients but for the names of tensors, which they share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.exchange.digest import text_digest
from fedexlora.exchange.files import replace_bytes, sync_folder
from fedexlora.exchange.records import ClientRecord
from fedexlora.exchange.tensors import LazyMapping, TensorFile
from fedexlora.exchange.untrusted import json_object, number, short
from fedexlora.exchange.wire import CHECKSUM, HEADER, digest, pack
from fedexlora.rounds.common_update import CommonForm

_DRAW = "draw.json"
_UNREADABLE = (ValueError, KeyError, OSError)


@dataclass(frozen=True, slots=True)
class SpooledUpdate:
    """One client's update on disk."""

    file: TensorFile
    form: CommonForm
    record: ClientRecord
    """Its weight is what the update counts; only ratios matter."""
    landed: bool
    """Whether the client is known to hold the version that the round started from."""

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.record.client

    @property
    def _tensors(self) -> Mapping[str, Tensor]:
        return LazyMapping(self.file.read, self.file.tensors)

    @property
    def weight(self) -> float:
        """What it counts."""
        return self.record.weight

    def factors(self, module: str) -> Factors:
        """As of :class:`~fedexlora.rounds.common_update.CommonUpdate`."""
        return self.form.factors_from(self._tensors, module)

    def start(self, module: str) -> Factors | None:
        """As of :class:`~fedexlora.rounds.common_update.CommonUpdate`."""
        if f"A0/{module}" not in self.file.tensors:
            return None
        return self.form.factors_from(self._tensors, module, ("A0", "B0"))

    def head(self, name: str) -> Tensor:
        """A head or bias."""
        return self.file.read(f"dense/{name}")

    def weighed(self, record: ClientRecord) -> SpooledUpdate:
        """The same update, which counts as a rule says."""
        return replace(self, record=record)


@dataclass(frozen=True, slots=True)
class InterruptedRound:
    """What it has left."""

    draw: tuple[str, ...] | None
    """Who takes part; None if nobody was asked."""
    updates: Mapping[str, SpooledUpdate] = field(default_factory=dict)
    """By client."""
    faults: tuple[str, ...] = ()
    """Files that are passed over, and why; their clients are asked again."""


class Spool:
    """The spool of one round.

    Args:
        path: its folder.
        round_: the round, from 1.
        form: the form in which updates are stored; its version is that of the round.
    """

    def __init__(self, path: Path, round_: int, form: CommonForm) -> None:
        self.path = path
        self._round = round_
        self._form = form
        self._layouts: dict[str, TensorFile] = {}

    def begin(self, clients: Sequence[str]) -> None:
        """Empty the spool and make the draw durable; before anyone is asked.

        Raises:
            OSError: if it cannot be written.
        """
        if self.path.exists():
            for file in self.path.iterdir():
                file.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path.parent)
        self.draw(clients)

    def draw(self, clients: Sequence[str]) -> None:
        """Make a draw durable; the updates that are there stay.

        Raises:
            OSError: if it cannot be written.
        """
        said = {"round": self._round, "version": self._form.before.id, "clients": list(clients)}
        replace_bytes(self.path / _DRAW, json.dumps(said).encode())

    def add(
        self, tensors: Mapping[str, Tensor], record: ClientRecord, *, landed: bool
    ) -> SpooledUpdate:
        """Put an update on disk: it survives this process, and not always a power failure.

        Args:
            tensors: in the common form.
            record: of the client.
            landed: whether the client is known to hold the version of the round.

        Raises:
            OSError: if it cannot be written, as on a full disk.
        """
        header = {
            "round": self._round,
            "version": self._form.before.id,
            "record": record.model_dump(mode="json"),
            "landed": landed,
        }
        path = self._file(record.client)
        # Not forced to the disk, which would cost more than many a small client's training: what a
        # power failure damages has another checksum, and its client is asked again.
        replace_bytes(path, pack(tensors, header), sync=False)
        return SpooledUpdate(self._opened(path), self._form, record, landed)

    def find(self) -> InterruptedRound:
        """What there is of this round; what is of another one, as after a rollback, is not."""
        path = self.path / _DRAW
        if not path.exists():
            return InterruptedRound(None)
        try:
            said = json_object(path.read_bytes())
            clients = tuple(map(str, said["clients"]))
            if (number(said, "round"), said["version"]) != (self._round, self._form.before.id):
                return InterruptedRound(None)  # a round that is over, or was rolled back
        except _UNREADABLE as error:
            return InterruptedRound(None, faults=(f"{path} is damaged: {error}",))
        updates, faults = {}, []
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                update = self._read(file)
            except _UNREADABLE as error:
                faults.append(f"{file} is passed over: {error}")
                continue
            updates[update.client] = update
        return InterruptedRound(clients, updates, tuple(faults))

    def discard(self, client: str) -> None:
        """Remove a client's update.

        Raises:
            OSError: if it cannot be removed.
        """
        self._file(client).unlink(missing_ok=True)

    def _file(self, client: str) -> Path:
        return self.path / f"{client}.safetensors"

    def _read(self, path: Path) -> SpooledUpdate:
        """An update that was stored before this process began; its bytes are looked at once."""
        file = self._opened(path)
        header = json_object(file.metadata[HEADER])
        tensors = {name: file.read(name) for name in file.tensors}
        if file.metadata.get(CHECKSUM) != digest(tensors, file.metadata[HEADER]):
            raise ValueError("its content has not the checksum that it was written with")
        if (number(header, "round"), header["version"]) != (self._round, self._form.before.id):
            raise ValueError(f"it is one of round {short(header['round'])}")
        record = ClientRecord.model_validate(header["record"])
        if path.stem != record.client:
            raise ValueError(f"it is an update of {short(record.client)}")
        if missing := self._form.required() - file.tensors.keys():
            raise ValueError(f"it lacks {short(sorted(missing))}")
        return SpooledUpdate(file, self._form, record, header["landed"] is True)

    def _opened(self, path: Path) -> TensorFile:
        """A file whose layout is shared with those of the same layout."""
        found = TensorFile.open(path)
        key = repr([(name, str(spec), found.places[name]) for name, spec in found.tensors.items()])
        first = self._layouts.setdefault(text_digest(key), found)
        return replace(found, tensors=first.tensors, places=first.places)
