"""What the server keeps so that a client that comes back gets no more than what it lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step import Step


@dataclass(frozen=True, slots=True)
class History:
    """The last steps; what is older lives only in the total."""

    window: int
    """How many steps are promised."""
    steps: Mapping[int, Step] = field(default_factory=dict)
    """By the version that they lead to."""
    starts: Mapping[int, GlobalState] = field(default_factory=dict)
    """What clients began to train from in those versions, without remainders."""

    def after(self, step: Step, state: GlobalState) -> History:
        """This history and one more step, with the version that it led to."""
        oldest = step.version - self.window
        steps = {v: s for v, s in self.steps.items() if v > oldest}
        starts = {v: s for v, s in self.starts.items() if v >= oldest}
        return replace(
            self,
            steps={**steps, step.version: step},
            starts={**starts, step.version: state.start()},
        )

    def reaches(self, held: int, version: int) -> bool:
        """Whether a holder of a version can be brought to another one by steps."""
        return held < version and all(v in self.steps for v in range(held + 1, version + 1))

    def id_of(self, version: int) -> str | None:
        """The id of a version, if a step leads to it or on from it."""
        if version in self.steps:
            return self.steps[version].id
        return self.steps[version + 1].previous if version + 1 in self.steps else None


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the server knows of what clients hold."""

    versions: Mapping[str, int]
    """The version that each client landed on last; none for clients that hold nothing."""
    history: History
    """What leads clients from there to the version of now."""
    changes: Mapping[str, int | None] = field(default_factory=dict)
    """What the last round changed of it, by client; None for those that hold nothing now."""

    def ids(self) -> dict[str, tuple[int, str]]:
        """The version that clients hold and its id, where the history still knows it."""
        known = {v: self.history.id_of(v) for v in set(self.versions.values())}
        return {c: (v, found) for c, v in self.versions.items() if (found := known[v])}

    def after(
        self, step: Step, state: GlobalState, landed: Iterable[str], lost: Iterable[str]
    ) -> Holdings:
        """What holds after a round.

        Args:
            step: what the round led to.
            state: the version that was reached.
            landed: the clients that came to the version that the round started from.
            lost: the clients that held nothing, unless they landed afterwards.
        """
        now = dict.fromkeys(landed, step.version - 1)
        gone = {client for client in lost if client not in now}
        kept = {client: v for client, v in self.versions.items() if client not in gone}
        changes = dict.fromkeys(gone & self.versions.keys()) | now
        return Holdings(kept | now, self.history.after(step, state), changes)
