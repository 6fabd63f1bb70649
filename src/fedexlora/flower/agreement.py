"""On what nodes agree before round 1, where the server has no model: base, layers, heads.

Until as many as the run waits for have said it, all stand. Then the beginning that most of them
state is that of the run, and whoever states another one is no client, by name and by digest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedexlora.peft_bridge.origin import Statement


@dataclass(slots=True)
class Agreement:
    """What nodes have stated, and what the run begins with once that is settled."""

    stated: dict[str, Statement] = field(default_factory=dict)
    """By client."""
    settled: Statement | None = None
    """What most have stated."""

    def fault(self, statement: Statement) -> str:
        """Why a node with this beginning cannot take part; empty if it can, or all may still."""
        if self.settled is None:
            return ""
        if found := statement.differences(self.settled):
            return f"its model is not the one that most nodes have: {'; '.join(found)}"
        return ""

    def settle(self) -> Mapping[str, str]:
        """Decide for the beginning that most have stated; of equally many, for the first client's.

        Returns:
            The clients that stated another one, and in what it differs.
        """
        names = sorted(self.stated)
        counts = Counter(_model(self.stated[name]) for name in names)
        most = max(names, key=lambda name: counts[_model(self.stated[name])])
        agreed = [x for x in names if _model(self.stated[x]) == _model(self.stated[most])]
        drawn = Counter(self.stated[name].adapter for name in agreed)
        chosen = max(agreed, key=lambda name: drawn[self.stated[name].adapter])
        self.settled = self.stated[chosen]
        faults = {name: self.fault(self.stated[name]) for name in names}
        odd = {name: fault for name, fault in faults.items() if fault}
        for name in odd:
            del self.stated[name]
        return odd

    def senders(self) -> list[str]:
        """The clients that have drawn what the run begins with, by name."""
        if self.settled is None:
            return []
        drawn = self.settled.adapter
        return [name for name in sorted(self.stated) if self.stated[name].adapter == drawn]


def _model(statement: Statement) -> tuple[str, str, str]:
    return statement.base, statement.spec, statement.heads
