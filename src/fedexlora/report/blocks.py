"""What a report's page is made of, from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedexlora.report.chart import Chart
from fedexlora.report.tables import Table


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph."""

    text: str
    kind: str = "words"


@dataclass(frozen=True, slots=True)
class Notes:
    """Things that a reader should know before the figures."""

    title: str
    notes: Sequence[str]
    kind: str = "notes"


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    facts: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True, slots=True)
class Figures:
    """Charts, side by side where there is room."""

    charts: Sequence[Chart]
    kind: str = "figures"


@dataclass(frozen=True, slots=True)
class Rows:
    """A table."""

    title: str
    table: Table
    folded: bool = False
    """Whether it is only seen when it is asked for."""
    kind: str = "rows"


@dataclass(frozen=True, slots=True)
class Code:
    """Text to be copied."""

    title: str
    text: str
    folded: bool = False
    kind: str = "code"


Block = Words | Notes | Facts | Figures | Rows | Code


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, which its list of contents names."""

    name: str
    """Its anchor."""
    title: str
    blocks: tuple[Block, ...]
