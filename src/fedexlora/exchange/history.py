"""What the server knows of its past, so that a client that comes back gets no more than it lacks.

Steps stay where they were written: of a version that is promised to clients, its id is in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from fedexlora.errors import VersionError
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step import Step
from fedexlora.exchange.step_writer import StepBuilder, StepSink
from fedexlora.exchange.version import Adapter


class Steps(Protocol):
    """Where steps are written when they are made, and read when they are sent."""

    def sink(
        self,
        before: GlobalState,
        letters: Sequence[str],
        owners: Mapping[str, str] | None = None,
        clients: Collection[str] = (),
        *,
        remembers: bool = False,
    ) -> StepSink:
        """What takes in the step that leads on from a version.

        Args:
            before: the version.
            letters: the factors that the step changes, of ``("A", "B")``.
            owners: by client whose own adapter may change, the first one that has the same.
            clients: those of which the round may change what they hold.
            remembers: whether the server remembers anything of the modules.

        Raises:
            RunError: if it cannot be written.
        """

    def step(self, version: int) -> Step:
        """The step that leads to a version.

        Raises:
            VersionError: if it is not there, or cannot be read.
        """

    def memory(self, version: int) -> Mapping[str, Mapping[str, Tensor]]:
        """What the server remembers of the step that led to a version, by module and letter.

        Raises:
            VersionError: if it cannot be read.
        """

    def start(self, version: int) -> GlobalState:
        """What clients of a version began to train from: that version without the remainder.

        Raises:
            VersionError: if it is not there, or cannot be read.
        """


class StepMemory:
    """Steps in memory, for federations that are not stored."""

    def __init__(self) -> None:
        self._steps: dict[int, Step] = {}
        self._starts: dict[int, GlobalState] = {}
        self._memory: dict[int, Mapping[str, Mapping[str, Tensor]]] = {}

    def sink(
        self,
        before: GlobalState,
        letters: Sequence[str],
        owners: Mapping[str, str] | None = None,
        clients: Collection[str] = (),
        *,
        remembers: bool = False,
    ) -> StepSink:
        """See :class:`Steps`."""
        del owners, clients, remembers
        self._starts[before.version] = before.start()
        return _Remembered(self._steps, self._memory, before, letters)

    def keep(self, step: Step, reached: GlobalState) -> None:
        """Remember a step, and the version that it leads to."""
        self._steps[step.version] = step
        self._starts[reached.version] = reached.start()

    def step(self, version: int) -> Step:
        """See :class:`Steps`."""
        if version not in self._steps:
            raise VersionError(f"there is no step to version {version}")
        return self._steps[version]

    def memory(self, version: int) -> Mapping[str, Mapping[str, Tensor]]:
        """See :class:`Steps`."""
        return self._memory.get(version, {})

    def start(self, version: int) -> GlobalState:
        """See :class:`Steps`."""
        if version not in self._starts:
            raise VersionError(f"version {version} is not known")
        return self._starts[version]


class _Remembered(StepBuilder):
    """A builder whose step is remembered."""

    def __init__(
        self,
        steps: dict[int, Step],
        memories: dict[int, Mapping[str, Mapping[str, Tensor]]],
        before: GlobalState,
        letters: Sequence[str],
    ) -> None:
        super().__init__(before.version + 1, before.id, letters)
        self._steps, self._memories = steps, memories

    def finish(
        self,
        dense: Mapping[str, Tensor],
        own: Mapping[str, Adapter],
        own_digests: Mapping[str, str],
        held: Mapping[str, int | None],
    ) -> Step:
        """See :class:`StepSink`."""
        step = super().finish(dense, own, own_digests, held)
        self._steps[step.version], self._memories[step.version] = step, self.memory
        return step


@dataclass(frozen=True, slots=True)
class History:
    """The versions from which clients are led to that of now by steps."""

    window: int
    """How many steps are promised."""
    store: Steps = field(default_factory=StepMemory)
    """Where they are."""
    ids: Mapping[int, str] = field(default_factory=dict)
    """The ids of the promised versions, one after the other, up to the version of now."""

    def after(self, step: Step) -> History:
        """This history and one more step."""
        known = {**self.ids, step.version - 1: step.previous, step.version: step.id}
        oldest = step.version - self.window
        return replace(
            self, ids={version: known[version] for version in known if version >= oldest}
        )

    def reaches(self, held: int, version: int) -> bool:
        """Whether a holder of a version can be brought to another one by steps."""
        return held < version and held in self.ids and version in self.ids

    def id_of(self, version: int) -> str | None:
        """The id of a version, if it is promised."""
        return self.ids.get(version)

    def steps(self, held: int, version: int) -> list[Step]:
        """The steps from a version to another one, which are read when their parts are.

        Raises:
            VersionError: if one is not in the store any more, or is another one.
        """
        return [self._step(v) for v in range(held + 1, version + 1)]

    def _step(self, version: int) -> Step:
        step = self.store.step(version)
        if (step.version, step.id) != (version, self.ids[version]):
            raise VersionError(
                f"step {version} of the store is not the one that was made",
                [f"expected {self.ids[version]}, found version {step.version}, {step.id}"],
            )
        return step

    def start(self, version: int) -> GlobalState | None:
        """What clients of a version began to train from, if it is promised; without remainder.

        Raises:
            VersionError: if it cannot be read.
        """
        return self.store.start(version) if version in self.ids else None


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the server knows of what clients hold."""

    versions: Mapping[str, int]
    """The version that each client landed on last; none for clients that hold nothing."""
    history: History
    """What leads clients from there to the version of now."""

    def ids(self) -> dict[str, tuple[int, str]]:
        """The version that clients hold and its id, where the history still knows it."""
        known = {v: self.history.id_of(v) for v in set(self.versions.values())}
        return {c: (v, found) for c, v in self.versions.items() if (found := known[v])}

    def changes(
        self, version: int, landed: Iterable[str], lost: Iterable[str]
    ) -> dict[str, int | None]:
        """What a round changes of it, by client: the version; None for those that hold nothing now.

        Args:
            version: the one that the round started from.
            landed: the clients that came to it.
            lost: the clients that held nothing, unless they landed afterwards.
        """
        now = dict.fromkeys(landed, version)
        gone = {client for client in lost if client not in now}
        return dict.fromkeys(sorted(gone & self.versions.keys())) | now

    def after(self, step: Step, changes: Mapping[str, int | None]) -> Holdings:
        """What holds after a round.

        Args:
            step: what the round led to.
            changes: from :meth:`changes`.
        """
        return Holdings(with_changes(self.versions, changes), self.history.after(step))


def with_changes(held: Mapping[str, int], changes: Mapping[str, int | None]) -> dict[str, int]:
    """What clients hold after a round has changed it; clients that hold nothing are left out."""
    kept = {
        client: version for client, version in held.items() if changes.get(client, 0) is not None
    }
    return kept | {client: version for client, version in changes.items() if version is not None}
