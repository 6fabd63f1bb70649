"""What a run does by a method: what clients train and send, and what the server makes of it.

All of it is data and pure functions over values:

    client.enter   what a client starts a round from, given the version and its memory
    client.leave   what it sends, given what it trained, and its memory of the round
    server         one module's uploads to the next adapter and what is added beside the weight

Memory is tensors by name. A client's is a file on its own disk, kept by round; the server's, one a
module, is kept with the step of the round that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from fedexlora.algebra.assignment import Holder
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.moments import Moments
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.version import Adapter

Letters = tuple[str, ...]
"""Of ``("A", "B")``."""
MemoryRule = Literal["none", "optional", "required"]
Memory = Mapping[str, Tensor]
"""What is remembered from one round to a later one, by name; empty for nothing."""
_NOTHING: Memory = MappingProxyType({})
Slots = Mapping[str, Tensor]
"""By module, which of its ranks are meant: bool ``(R,)``, of rows of ``A`` and columns of ``B``."""


@dataclass(frozen=True, slots=True)
class Trainables:
    """Everything that a client trains."""

    factors: Adapter
    """By module, ``A (R, N)`` and ``B (M, R)``."""
    heads: Mapping[str, Tensor]
    """Heads and biases, by name."""


@dataclass(frozen=True, slots=True)
class ClientRound:
    """One client in one round."""

    client: str
    round: int
    """From 1."""
    received: Trainables
    """Of the version that the round starts from."""
    memory: Memory
    """Of the last round that the client took part in; empty if there is none."""
    fresh: Callable[[], Adapter]
    """Draws new factors of its own, as PEFT initialises them, by seed, round and client."""


def _received(at: ClientRound) -> Trainables:
    return at.received


def _as_trained(at: ClientRound, trained: Trainables) -> tuple[Trainables, Memory]:
    del at
    return trained, _NOTHING


@dataclass(frozen=True, slots=True)
class ClientRule:
    """What a client does on entering and leaving a round."""

    enter: Callable[[ClientRound], Trainables] = _received
    """What it starts from; by default what it received."""
    leave: Callable[[ClientRound, Trainables], tuple[Trainables, Memory]] = _as_trained
    """What it sends of what it has trained, and what it remembers; by default as it is, nothing."""
    memory: MemoryRule = "none"
    """Whether it remembers anything, and whether one that lost it starts anew or is left out."""
    slots: Callable[[ClientRound, Trainables], Slots] | None = None
    """Which ranks it trains, by what a first epoch made of all of them, which is undone then; the
    others are put back after every step. All, without such an epoch, if not given."""


@dataclass(frozen=True)  # no slots: the moments are kept
class ModuleRound:
    """One module in one round, as the server sees it; updates have the common rank and scaling."""

    name: str
    round: int
    """From 1."""
    scaling: float
    """What PEFT multiplies ``B A`` by."""
    clients: Callable[[], Iterator[tuple[Factors, float]]]
    """Factors and weight of every update, one after the other, as often as it is called; what the
    version itself counts comes first, if it counts."""
    holder: Holder
    """Of the common adapter."""
    owners: Mapping[str, Holder]
    """The clients that have an adapter of another rank or scaling."""
    offset: LowRank
    """What clients of such adapters hold beside the weight, on average, ``(M, N)``; it goes to the
    weight whatever the method does."""
    memory: Memory = field(default_factory=dict)
    """What the server remembers of the module from the round before."""
    ranks: tuple[int, ...] = ()
    """The rank at which every update was trained, in the order of :attr:`clients`: rows of A and
    columns of B beyond it are padding. Empty if all have the common rank."""
    norms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By module, ``|B A|`` of every update in the order of :attr:`clients`; of all modules, and
    only for a rule that surveys them."""

    @cached_property
    def moments(self) -> Moments:
        """The weighted mean factors, and what averaging them loses."""
        return Moments.over(self.clients())


@dataclass(frozen=True, slots=True)
class Truncation:
    """A remainder of which a stated part is left out."""

    whole: LowRank
    kept: LowRank
    lacks: float
    """The norm of the difference."""


@dataclass(frozen=True, slots=True)
class ModuleStep:
    """What the server makes of one module; matrices are ``(M, N)``, unscaled."""

    adapter: Factors
    """What clients continue from, at the rank of the holder."""
    remainder: LowRank
    """What is added beside the weight, but for the offset."""
    own: Mapping[str, Factors] = field(default_factory=dict)
    """What those with an adapter of their own continue from."""
    truncation: Truncation | None = None
    """What of the remainder is left out, if that is stated and held to."""
    added: LowRank | None = None
    """What goes beyond the ideal on purpose, as momentum does."""
    memory: Memory = field(default_factory=dict)
    """What is remembered for the next round."""
    memory_error: float = 0.0
    """The norm of what the memory lacks, if it is held at a lower rank."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A method with its options."""

    server: Callable[[ModuleRound], ModuleStep]
    exact: bool
    """Whether the global model applies the ideal mean update, to rounding."""
    certified: bool
    """Whether every round is held to what the server's rule states: the ideal, what is added to it
    and what is left out of it."""
    halves: tuple[Letters, ...] = (("A", "B"),)
    """The factors that clients train, round by round; after the last, the first again."""
    local: Letters = ()
    """The trained factors that stay with their client."""
    local_heads: bool = False
    """Whether heads and biases stay with their client."""
    changes: Letters | None = None
    """The factors that the server changes; those that are uploaded if not given."""
    client: ClientRule | None = None
    """What clients do on entering and leaving a round, if anything."""
    remembers: bool = False
    """Whether the server remembers something of every module."""
    surveys: bool = False
    """Whether the server's rule looks at the norms of all modules first."""
    own_adapters: bool = False
    """Whether every client continues from the factors that it trained itself, with one model."""
    personal: bool = False
    """Whether every client has a model of its own: there is no global one to score or export."""
    mixed_ranks: bool = False
    """Whether clients may have adapters of other ranks."""
    makes_up: bool = True
    """Whether such a client holds beside the weight what its adapter lacks of the common one, and
    so starts from the global model; if not, from the weight and its own adapter alone."""
    truncates: bool = False
    """Whether such a client's adapter is the first rows of the common A and the first columns of
    the common B, so that no rank may be larger than the common one."""
    draws: bool = False
    """Whether the server draws new factors, always or where an update has too few directions."""
    fresh_start: bool = False
    """Whether clients start every round from factors of their own whose product is zero, so that
    the adapter of version 0 must be zero too."""
    weighs_clients: bool = False
    """Whether the method weighs clients by what they send, and not by their rows."""
    late_updates: bool = False
    """Whether an update that was trained from an earlier version may count."""
    pooled: bool = False
    """Whether one client has the rows of all: nothing is federated then, and nobody is drawn."""
    start: tuple[str, ...] | None = None
    """The values of PEFT's ``init_lora_weights`` that it can start from; any if not given."""

    @property
    def remembers_at_clients(self) -> bool:
        """Whether clients remember something."""
        return self.client is not None and self.client.memory != "none"

    @property
    def factors(self) -> Letters:
        """The factors that ever change."""
        found = {x for half in self.halves for x in half} | set(self.changes or ())
        return tuple(letter for letter in "AB" if letter in found)

    def trains(self, round_: int) -> Letters:
        """The factors that clients train in a round, from 1."""
        return self.halves[(round_ - 1) % len(self.halves)]

    def uploads(self, round_: int) -> Letters:
        """The factors that clients send in a round, from 1."""
        return tuple(letter for letter in self.trains(round_) if letter not in self.local)

    def steps(self, round_: int) -> Letters:
        """The factors that a round's step changes."""
        return self.uploads(round_) if self.changes is None else self.changes

    def upload_spec(self, spec: AdapterSpec, round_: int) -> AdapterSpec:
        """What an update of a round must contain.

        Args:
            spec: the client's adapter and heads.
            round_: from 1.
        """
        return spec.sending(self.uploads(round_), heads=not self.local_heads)
