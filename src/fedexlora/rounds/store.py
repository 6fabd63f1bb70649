"""The versions of a run on disk: every step as it was sent, and a snapshot now and then.

    versions/snapshot-0000.safetensors   version 0, and every tenth one: all of it, in float64
    versions/step-0001.safetensors       what leads to version 1, the record of its round, and what
                                         it changed of what clients hold

Files are written beside, forced to disk and renamed, and never changed: what a round writes is
about the size of its step. A version is read as the last snapshot before it and the steps from
there, added up in order: a function of these files alone, so that a run which is continued has the
same bits. Steps older than the history that clients are promised are removed once a snapshot
stands for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedexlora.errors import VersionError
from fedexlora.exchange.digest import group, known_digest
from fedexlora.exchange.files import replace_bytes
from fedexlora.exchange.history import History, Holdings
from fedexlora.exchange.layout import own_from, own_tensors, unpack_finite
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.state import GlobalState, own_adapter, state_from, state_tensors
from fedexlora.exchange.step import Step, decode_steps, encode_steps
from fedexlora.exchange.untrusted import number, short
from fedexlora.exchange.wire import pack

SNAPSHOT_ROUNDS = 10
"""A snapshot is kept of every version that is a multiple."""
_UNREADABLE = (ValueError, KeyError, OSError, VersionError)


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """The last version that can be read."""

    state: GlobalState
    holdings: Holdings
    record: RoundRecord | None
    """The record of the round that led to it, if its step is there."""
    damaged: Mapping[Path, str]
    """Files that were passed over, and why."""


@dataclass(frozen=True, slots=True)
class _StoredStep:
    """A step that was read, and where it led."""

    step: Step
    state: GlobalState
    record: RoundRecord
    held: Mapping[str, int | None]
    """By client whose holding the round changed, the version; None for nothing."""


class VersionStore:
    """The store of one run.

    Args:
        path: its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def snapshot_file(self, version: int) -> Path:
        """The whole of a version."""
        return self.path / f"snapshot-{version:04d}.safetensors"

    def step_file(self, version: int) -> Path:
        """What leads to a version."""
        return self.path / f"step-{version:04d}.safetensors"

    def add_snapshot(self, state: GlobalState, holdings: Holdings) -> None:
        """Write a version whole, with what clients hold.

        Raises:
            OSError: if it cannot be written.
        """
        header = {"version": state.version, "id": state.id, "held": dict(holdings.versions)}
        replace_bytes(self.snapshot_file(state.version), pack(state_tensors(state), header))

    def add_step(self, step: Step, holdings: Holdings, record: RoundRecord) -> None:
        """Write a step with the record of its round.

        Args:
            step: the step.
            holdings: what clients hold after the round.
            record: that one.

        Raises:
            OSError: if it cannot be written.
        """
        tensors, header = encode_steps([step])
        header |= {"version": step.version, "id": step.id, "held": dict(holdings.changes)}
        header["record"] = record.model_dump(mode="json")
        replace_bytes(self.step_file(step.version), pack(tensors | own_tensors(step.own), header))

    def read(self, window: int) -> StoredVersion | None:
        """The last version, and the steps that clients are promised; None of an empty store.

        A step that is damaged is passed over with those after it, a snapshot that is damaged for
        the one before.

        Args:
            window: how many steps are promised.

        Raises:
            VersionError: if no version can be read, naming every file.
        """
        damaged: dict[Path, str] = {}
        snapshot = self._last_snapshot(damaged)
        if snapshot is None:
            if not damaged and self._versions("step"):
                damaged[self.snapshot_file(0)] = f"there is no snapshot in {self.path}"
            if damaged:
                raise VersionError(f"{self.path}: no version can be read", [*damaged.values()])
            return None
        state, held = snapshot
        after = list(self._steps(state, damaged))
        version = after[-1].state.version if after else state.version
        first, before = self._before(state, version - window)
        history = History(window, {}, {first.version: first.start()})
        for found in (*before, *after):
            history = history.after(found.step, found.state)
        for found in after:
            state, held = found.state, _changed(held, found.held)
        record = next((found.record for found in reversed((*before, *after))), None)
        return StoredVersion(state, Holdings(held, history), record, damaged)

    def state(self, version: int) -> GlobalState:
        """One version, from the last snapshot before it.

        Raises:
            VersionError: if it cannot be read, naming every file that is damaged.
        """
        damaged: dict[Path, str] = {}
        snapshot = self._last_snapshot(damaged, version)
        state = snapshot[0] if snapshot else None
        if state is not None:
            for found in self._steps(state, damaged, version):
                state = found.state
        if state is None or state.version != version:
            raise VersionError(f"{self.path} has no version {version}", [*damaged.values()])
        return state

    def settle(self, state: GlobalState, holdings: Holdings, damaged: Mapping[Path, str]) -> None:
        """Make the store that of a run which has just reached a version.

        Raises:
            OSError: if a file cannot be written or removed.
        """
        for version in self._versions("step"):
            if version > state.version:
                self.step_file(version).unlink()
        for version in self._versions("snapshot"):
            if version > state.version or self.snapshot_file(version) in damaged:
                self.snapshot_file(version).unlink()
        self.keep_snapshots(state, holdings)

    def keep_snapshots(self, state: GlobalState, holdings: Holdings) -> None:
        """Write the snapshot of a version that has one, and remove what is no longer promised.

        What stays reaches back to the last snapshot that all promised steps lead on from, and is
        not the newest: that one may be damaged.

        Raises:
            OSError: if a file cannot be written or removed.
        """
        version, window = state.version, holdings.history.window
        due = version % SNAPSHOT_ROUNDS == 0
        if due and not self.snapshot_file(version).exists():
            self.add_snapshot(state, holdings)
        snapshots = self._versions("snapshot")
        oldest = max((s for s in snapshots[:-1] if s <= version - window), default=0)
        for found in snapshots:
            if found < oldest:
                self.snapshot_file(found).unlink()
        for found in self._versions("step"):
            if found <= oldest:
                self.step_file(found).unlink()

    def _last_snapshot(
        self, damaged: dict[Path, str], version: int | None = None
    ) -> tuple[GlobalState, dict[str, int]] | None:
        """The newest whole snapshot, that of a version at most, and what clients held then."""
        for found in reversed(self._versions("snapshot")):
            if version is not None and found > version:
                continue
            path = self.snapshot_file(found)
            try:
                return self._snapshot(found)
            except _UNREADABLE as error:
                damaged[path] = f"{path} is damaged: {error}"
        return None

    def _snapshot(self, version: int) -> tuple[GlobalState, dict[str, int]]:
        tensors, header = unpack_finite(self.snapshot_file(version).read_bytes())
        if number(header, "version") != version:
            raise ValueError(f"it is one of version {short(header['version'])}")
        held = {client: number(_held(header), client) for client in _held(header)}
        if any(v >= version for v in held.values()):
            raise ValueError(f"its header is not one of version {version}")
        return state_from(version, known_digest(header["id"]), tensors), held

    def _before(self, state: GlobalState, oldest: int) -> tuple[GlobalState, list[_StoredStep]]:
        """The steps that lead to a snapshot, as far back as they are promised, and from where."""
        snapshots = [v for v in self._versions("snapshot") if v < state.version]
        begun = max((v for v in snapshots if v <= oldest), default=min(snapshots, default=None))
        with suppress(*_UNREADABLE):  # clients of those versions get a snapshot then
            first = state if begun is None else self._snapshot(begun)[0]
            found = list(self._steps(first, {}, state.version))
            if found and found[-1].state.id == state.id:
                return first, found
        return state, []

    def _steps(
        self, state: GlobalState, damaged: dict[Path, str], last: int | None = None
    ) -> Iterator[_StoredStep]:
        """Steps one after the other, from a version to the last that is whole."""
        versions = [v for v in self._versions("step") if v > state.version]
        for version in versions:
            if last is not None and version > last:
                return
            path = self.step_file(version)
            try:
                found = self._step(version, state)
            except _UNREADABLE as error:
                damaged[path] = f"{path} is damaged: {error}"
                for after in versions[versions.index(version) + 1 :]:
                    path = self.step_file(after)
                    damaged[path] = f"{path} follows a step that is damaged"
                return
            state = found.state
            yield found

    def _step(self, version: int, before: GlobalState) -> _StoredStep:
        tensors, header = unpack_finite(self.step_file(version).read_bytes())
        if number(header, "version") != version:
            raise ValueError(f"it is one of version {short(header['version'])}")
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("own.")}
        rest = {name: tensor for name, tensor in tensors.items() if name not in own}
        (step,) = decode_steps(rest, header, version - 1)
        adapters = {c: own_adapter(x, before.adapter) for c, x in own_from(own).items()}
        if own_tensors(adapters).keys() != own.keys():
            raise ValueError(f"unexpected tensors: {short(sorted(own))}")
        state = before.advance([replace(step, own=adapters)])
        if step.id != header["id"] or group(state.own_digests) != step.digests.own:
            raise ValueError(f"it has not the id of version {version}")
        record = RoundRecord.model_validate(header["record"])
        held = {c: v if v is None else number(_held(header), c) for c, v in _held(header).items()}
        if record.round != version or any(v is not None and v >= version for v in held.values()):
            raise ValueError(f"its header is not one of version {version}")
        return _StoredStep(replace(step, own=adapters), state, record, held)

    def _versions(self, kind: str) -> list[int]:
        """The versions of which there is a file of a kind, in order."""
        files = self.path.glob(f"{kind}-*.safetensors")
        return sorted(int(x.stem.partition("-")[2]) for x in files if x.stem[-4:].isdecimal())


def _held(header: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(header["held"], dict):
        raise ValueError(f"header 'held': expected an object, found {short(header['held'])}")
    return header["held"]


def _changed(held: Mapping[str, int], changes: Mapping[str, int | None]) -> dict[str, int]:
    kept = {client: version for client, version in held.items() if client not in changes}
    return kept | {client: version for client, version in changes.items() if version is not None}
