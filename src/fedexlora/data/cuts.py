"""What ``max_length`` took from tokenised rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from enum import IntEnum

from datasets import Dataset


class Cut(IntEnum):
    """What one row lost."""

    NOTHING = 0
    TEXT = 1
    """The end of a text that is no target."""
    PROMPT = 2
    """The beginning of a prompt."""
    ANSWER_END = 3
    """The end of an answer, or of a text whose tokens are targets: the end token is gone."""


@dataclass(frozen=True, slots=True)
class CutRows:
    """How many rows of a split lost something."""

    rows: int
    """All rows."""
    cut: int
    """Those that lost anything."""
    answer_end: int
    """Those that lost the end of what is to be learned, and with it the end token."""

    @staticmethod
    def of(tokenized: Dataset) -> CutRows:
        """Count tokenised rows."""
        counts = Counter(tokenized["cut"][:])
        return CutRows(len(tokenized), len(tokenized) - counts[Cut.NOTHING], counts[Cut.ANSWER_END])

    def record(self) -> dict[str, int]:
        """For a run's header."""
        return asdict(self)

    def note(self, split: str, max_length: int) -> str | None:
        """In words; None if no row lost anything."""
        if not self.cut:
            return None
        answers = f", {self.answer_end:,} of them the end of the answer" if self.answer_end else ""
        cut = f"cuts {self.cut:,} of {self.rows:,} rows{answers}"
        return f"{split}: task.max_length = {max_length} {cut}"
