"""What can be known of a run before it: the output of ``fedexlora check --json``.

Bytes are those of messages and tensors. ``exact`` says whether a run without faults moves just
these, but for a few digits and for sums that compaction makes smaller; where numbers decide on
ranks, as by a share of energy, or who takes part is decided on the way, bytes are about these.
"""

from __future__ import annotations

from fedexlora.exchange.records import Record


class ModuleKindRecord(Record):
    """Adapted modules that are alike."""

    kind: str
    """The last part of their names."""
    count: int
    d_out: int
    d_in: int
    rank: int
    placement: str
    """Where the remainder lives: ``fold`` or ``side``."""
    reason: str
    """Why there."""
    piece_rank: int | None
    """Of a round's remainder; 0 if there is none, None if it is dense."""
    break_even: int
    """The rank from which a remainder is dense."""
    total_rank: int | None
    """Of all remainders after the last round."""
    dense_after: int | None
    """The round after which the sum of the remainders is dense; None if it is not within the run,
    or its pieces are no rank."""


class MemoryRecord(Record):
    """Bytes of one process."""

    where: str
    """``client``, ``server`` or ``one process``: both around one model, as ``fedexlora run``."""
    parts: dict[str, int]
    """What for."""
    total: int
    """The most at once: not the sum of the parts, as training and scoring take turns."""


class NewcomerRecord(Record):
    """What a client downloads that joins in a round."""

    round: int
    bytes: int


class ForecastRecord(Record):
    """What a recipe will take."""

    recipe: str
    method: str
    title: str
    rounds: int
    rehearsed: bool
    """Whether the weights were loaded and one step was taken and undone."""
    why_not: str
    """Why it was not; empty if it was."""
    notes: tuple[str, ...]
    """What is odd about rows or model, and yet no fault."""
    precision: str
    """How the adapted frozen weights are stored."""
    training: str
    """How training multiplies."""
    scoring: str
    device: str
    """Where local training is on this machine."""
    modules: tuple[ModuleKindRecord, ...]
    trained_parameters: int
    all_parameters: int
    clients: dict[str, int]
    """Training rows by client."""
    clients_per_round: int
    validation_rows: int
    exact: bool
    up: int
    """A client's update; the largest, where ranks differ."""
    down: int
    """What a client downloads that comes every round, from its second on."""
    down_first: int
    """The same in its first round, if that is the run's."""
    newcomers: tuple[NewcomerRecord, ...]
    """Of some rounds, the last one included."""
    round_up: tuple[int, ...]
    """By round, over all clients."""
    round_down: tuple[int, ...]
    memory: tuple[MemoryRecord, ...]
    disk: int
    """The most that the run's folder holds."""
    truncation: str
    """What cutting remainders changes; empty if none are cut."""
