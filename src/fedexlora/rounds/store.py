"""The versions of a run on disk: every step as it was made, and a snapshot now and then.

    versions/snapshot-0000.safetensors   version 0, and every tenth one: all of it, in float64
    versions/step-0001.safetensors       what leads to version 1, and what its round changed of
                                         what clients hold
    versions/.step-0002.safetensors.tmp  a step that is being made

Files are written beside, forced to disk and renamed, and never changed: what a round writes is
about the size of its step. A step's new name is what makes its round durable. A version is read as
the last snapshot before it and the steps from there, added up in order: a function of these files
alone, so that a run which is continued has the same bits. Steps older than the history that clients
are promised are removed once a snapshot stands for them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fedexlora.errors import VersionError
from fedexlora.exchange.digest import group, tensors_digest
from fedexlora.exchange.files import beside, rename
from fedexlora.exchange.history import History, Holdings, with_changes
from fedexlora.exchange.layout import dense_tensors
from fedexlora.exchange.snapshot_file import StoredSnapshot, read_snapshot, write_snapshot
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step import Step, check_parts
from fedexlora.exchange.step_file import StoredStep, open_step, read_step
from fedexlora.exchange.step_writer import StepSink, StepWriter

SNAPSHOT_ROUNDS = 10
"""A snapshot is kept of every version that is a multiple."""
_UNREADABLE = (ValueError, KeyError, VersionError)


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """The last version that can be read."""

    state: GlobalState
    holdings: Holdings
    damaged: Mapping[Path, str]
    """Files that were passed over, and why."""


@dataclass(frozen=True, slots=True)
class _ReadStep:
    """A step that was read, and where it led."""

    stored: StoredStep
    state: GlobalState


class VersionStore:
    """The store of one run: the :class:`~fedexlora.exchange.history.Steps` of its history.

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

    def sink(
        self,
        before: GlobalState,
        letters: Sequence[str],
        owners: Mapping[str, str] | None = None,
        clients: Collection[str] = (),
        *,
        remembers: bool = False,
    ) -> StepSink:
        """Begin the step that leads on from a version; see ``Steps.sink``."""
        version = before.version + 1
        return StepWriter(
            beside(self.step_file(version)),
            version,
            before.id,
            letters,
            modules=before.adapter,
            dense=before.dense,
            owners=owners,
            clients=clients,
            remembers=remembers,
        )

    def commit(self, version: int) -> None:
        """Give the finished step to a version its name, and so make the version durable.

        Raises:
            OSError: if it cannot be renamed.
        """
        path = self.step_file(version)
        rename(beside(path), path)

    def discard(self) -> None:
        """Remove steps that were begun, and not made durable."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def step(self, version: int) -> Step:
        """The step that leads to a version, by its header alone; see ``Steps.step``.

        Whoever receives it holds its parts against its digests.
        """
        path = self.step_file(version)
        try:
            return open_step(path).step
        except (*_UNREADABLE, OSError) as error:
            raise VersionError(f"{path} is damaged: {error}") from error

    def memory(self, version: int) -> Mapping[str, Mapping[str, Tensor]]:
        """What the server remembers of the step to a version; see ``Steps.memory``."""
        if version == 0:
            return {}
        path = self.step_file(version)
        try:
            return read_step(path).memory
        except (*_UNREADABLE, OSError) as error:
            raise VersionError(f"{path} is damaged: {error}") from error

    def start(self, version: int) -> GlobalState:
        """A version without the remainder; see ``Steps.start``."""
        damaged: dict[Path, str] = {}
        snapshot = self._last_snapshot(damaged, version, total=False)
        if snapshot is None:
            raise VersionError(f"{self.path} has no version {version}", [*damaged.values()])
        state = snapshot.state
        for found in range(state.version + 1, version + 1):
            state = self._started(state, found)
        return state.start()

    def add_snapshot(self, state: GlobalState, holdings: Holdings) -> None:
        """Write a version whole, with what clients hold.

        Raises:
            OSError: if it cannot be written.
        """
        write_snapshot(self.snapshot_file(state.version), state, holdings.versions)

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
        state, held = snapshot.state, snapshot.held
        for found in self._steps(state, damaged):
            state, held = found.state, with_changes(held, found.stored.held)
        history = History(window, self, self._promised(state, window))
        return StoredVersion(state, Holdings(held, history), damaged)

    def state(self, version: int) -> GlobalState:
        """One version, from the last snapshot before it.

        Raises:
            VersionError: if it cannot be read, naming every file that is damaged.
        """
        damaged: dict[Path, str] = {}
        snapshot = self._last_snapshot(damaged, version)
        state = snapshot.state if snapshot else None
        if state is not None:
            for found in self._steps(state, damaged, version):
                state = found.state
        if state is None or state.version != version:
            raise VersionError(f"{self.path} has no version {version}", [*damaged.values()])
        return state

    def settle(
        self,
        state: GlobalState,
        holdings: Holdings,
        damaged: Mapping[Path, str],
        best: int | None = None,
    ) -> None:
        """Make the store that of a run which has just reached a version; see `keep_snapshots`.

        Raises:
            OSError: if a file cannot be written or removed.
        """
        self.discard()
        for version in self._versions("step"):
            if version > state.version:
                self.step_file(version).unlink()
        for version in self._versions("snapshot"):
            if version > state.version or self.snapshot_file(version) in damaged:
                self.snapshot_file(version).unlink()
        self.keep_snapshots(state, holdings, best)

    def keep_snapshots(
        self, state: GlobalState, holdings: Holdings, best: int | None = None
    ) -> None:
        """Write the snapshot of a version that has one, and remove what is no longer promised.

        What stays reaches back to the last snapshot that all promised steps lead on from, and is
        not the newest: that one may be damaged. So does what leads to the best version.

        Args:
            state: the version of now.
            holdings: what clients hold.
            best: the version with the best score so far, if there is one.

        Raises:
            OSError: if a file cannot be written or removed.
        """
        version, window = state.version, holdings.history.window
        due = version % SNAPSHOT_ROUNDS == 0
        if due and not self.snapshot_file(version).exists():
            self.add_snapshot(state, holdings)
        snapshots = self._versions("snapshot")
        oldest = oldest_kept(snapshots, version, window)
        kept = version if best is None else best
        start = max((s for s in snapshots if s <= kept), default=0)
        for found in snapshots:
            if found < oldest and found != start:
                self.snapshot_file(found).unlink()
        # The step to the oldest snapshot stays: it has what the server remembers of that version.
        for found in self._versions("step"):
            if found < oldest and not start < found <= kept:
                self.step_file(found).unlink()

    def _last_snapshot(
        self, damaged: dict[Path, str], version: int | None = None, *, total: bool = True
    ) -> StoredSnapshot | None:
        """The newest whole snapshot, that of a version at most."""
        for found in reversed(self._versions("snapshot")):
            if version is not None and found > version:
                continue
            path = self.snapshot_file(found)
            try:
                stored = read_snapshot(path, total=total)
                if stored.state.version != found:
                    raise ValueError(f"it is one of version {stored.state.version}")
                return stored
            except _UNREADABLE as error:
                damaged[path] = f"{path} is damaged: {error}"
        return None

    def _promised(self, state: GlobalState, window: int) -> dict[int, str]:
        """The ids of the versions from which steps lead to a version, as many as are promised.

        As far back as all is whole: clients of older versions get a snapshot.
        """
        ids = {state.version: state.id}
        with suppress(*_UNREADABLE):
            for version in range(state.version, max(0, state.version - window), -1):
                step = read_step(self.step_file(version)).step
                if (step.version, step.id) != (version, ids[version]):
                    break
                self.start(version - 1)
                ids[version - 1] = step.previous
        return dict(sorted(ids.items()))

    def _started(self, before: GlobalState, version: int) -> GlobalState:
        """A version without the remainder, from the one before; of its step, no piece is read."""
        path = self.step_file(version)
        try:
            step = open_step(path).step
            check_parts(
                step,
                {
                    "adapter": tensors_digest(step.factors),
                    "heads": tensors_digest(dense_tensors(step.dense)),
                },
            )
            return _reached(before, replace(step, pieces={}), version)
        except (*_UNREADABLE, OSError) as error:
            raise VersionError(f"{path} is damaged: {error}") from error

    def _steps(
        self, state: GlobalState, damaged: dict[Path, str], last: int | None = None
    ) -> Iterator[_ReadStep]:
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

    def _step(self, version: int, before: GlobalState) -> _ReadStep:
        stored = read_step(self.step_file(version))
        return _ReadStep(stored, _reached(before, stored.step, version))

    def _versions(self, kind: str) -> list[int]:
        """The versions of which there is a file of a kind, in order."""
        pattern = re.compile(rf"{kind}-(\d{{4}}|[1-9]\d{{4,8}})")  # others' copies are not ours
        names = (pattern.fullmatch(file.stem) for file in self.path.glob("*.safetensors"))
        return sorted(int(name[1]) for name in names if name)


def oldest_kept(snapshots: Sequence[int], version: int, window: int) -> int:
    """The snapshot before which nothing is kept.

    Args:
        snapshots: the versions that have one, in order.
        version: the last one.
        window: how many steps clients are promised.
    """
    return max((s for s in snapshots[:-1] if s <= version - window), default=0)


def _reached(before: GlobalState, step: Step, version: int) -> GlobalState:
    """The version that a stored step leads to.

    Raises:
        ValueError: if it leads to another one.
        VersionError: if it does not lead on from the version before.
    """
    if step.version != version:
        raise ValueError(f"it is one of version {step.version}")
    state = before.advance([step])
    if group(state.own_digests) != step.digests.own:
        raise ValueError(f"it has not the own adapters of version {version}")
    return state
