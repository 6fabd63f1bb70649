"""What a run without faults sends and stores, in bytes, by the layouts of messages and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.sizes import (
    own_size,
    shape_adapter,
    shape_state,
    shape_step,
    snapshot_file_size,
    snapshot_size,
    step_file_size,
    steps_size,
    update_size,
)
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step import Step
from fedexlora.exchange.version import Adapter
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.remainders import Remainders
from fedexlora.rounds.store import SNAPSHOT_ROUNDS, oldest_kept

_BASE = "999999999 entries in float32, 0123456789abcdef"
"""About as long as the fingerprint of a base."""


@dataclass(frozen=True)  # no slots: sizes are kept
class Traffic:
    """The messages and files of a run, round by round."""

    recipe: Recipe
    spec: AdapterSpec
    """The common adapter."""
    specs: Mapping[str, AdapterSpec]
    """The adapters of the clients that have another one, by client."""
    rows: Mapping[str, int]
    """Training rows by client."""
    remainders: Remainders
    _down: dict[tuple[int | None, int], int] = field(default_factory=dict, compare=False)

    @cached_property
    def totals(self) -> Sequence[Mapping[str, LowRank]]:
        """The cumulative remainder of versions 0, 1, ..."""
        return self.remainders.totals(self.recipe.federation.rounds)

    @cached_property
    def own(self) -> Mapping[str, Adapter]:
        """The adapters of clients that have their own."""
        specs = dict(self.specs)
        if self.recipe.rule.own_adapters:
            # Each its own object, as their numbers differ.
            return {c: shape_adapter(specs.get(c, self.spec)) for c in self.rows}
        made = {id(x): shape_adapter(x) for x in specs.values()}
        return {client: made[id(x)] for client, x in specs.items()}

    def state(self, version: int) -> GlobalState:
        """A version, without numbers."""
        first = version == 0 and self.recipe.rule.own_adapters
        own = {c: x for c, x in self.own.items() if c in self.specs} if first else self.own
        return shape_state(version, self.spec, self.totals[version], own)

    def step(self, version: int) -> Step:
        """The step that leads to a version, without numbers."""
        rule, pieces = self.recipe.rule, self.remainders.of_round(version)
        sent = rule.upload_spec(self.spec, version)
        return shape_step(version, sent, rule.steps(version), pieces, self.own)

    def up(self, client: str, round_: int = 1) -> int:
        """A client's update."""
        rule, rows = self.recipe.rule, self.rows[client]
        spec = rule.upload_spec(self.specs.get(client, self.spec), round_)
        said = rule.remembers_at_clients
        return update_size(spec, client, round_, rows, _BASE, remembers=said)

    def down(self, client: str, held: int | None, round_: int) -> int:
        """What brings a client to the version that a round starts from.

        Args:
            client: the client.
            held: the version that it has; None for nothing.
            round_: the round.
        """
        version = round_ - 1
        if held is not None and held < version - self.recipe.federation.history:
            held = None
        key = held, version
        if key not in self._down:
            self._down[key] = (
                snapshot_size(self.state(version))
                if held is None
                else steps_size([self.step(v) for v in range(held + 1, version + 1)])
            )
        return self._down[key] + own_size(self.state(version), client)

    def rounds(self) -> tuple[list[int], list[int]]:
        """Bytes up and down of every round, over the clients that are drawn."""
        held: dict[str, int] = {}
        up, down = [], []
        for round_ in range(1, self.recipe.federation.rounds + 1):
            seed = self.recipe.federation.seed
            drawn = self.recipe.participation.sample(tuple(self.rows), seed, round_)
            up.append(sum(self.up(client, round_) for client in drawn))
            down.append(sum(self.down(client, held.get(client), round_) for client in drawn))
            held |= dict.fromkeys(drawn, round_ - 1)
        return up, down

    def folder(self) -> int:
        """The most that the versions, the open round and the adapters take on the disk."""
        rounds, window = self.recipe.federation.rounds, self.recipe.federation.history
        drawn = self.recipe.participation.sample(tuple(self.rows), 0, 1)
        spool = sum(self.up(client) for client in drawn)
        snapshots = {0: snapshot_file_size(self.state(0))}
        steps: dict[int, int] = {}
        most = snapshots[0]
        for version in range(1, rounds + 1):
            steps[version] = step_file_size(self.step(version))
            if version % SNAPSHOT_ROUNDS == 0:
                snapshots[version] = snapshot_file_size(self.state(version))
            most = max(most, sum(snapshots.values()) + sum(steps.values()) + spool)
            oldest = oldest_kept(sorted(snapshots), version, window)
            snapshots = {v: size for v, size in snapshots.items() if v >= oldest}
            steps = {v: size for v, size in steps.items() if v >= oldest}
        kept = sum(snapshots.values()) + sum(steps.values())
        # The final adapter, and where there are scores that of the best version.
        adapters = 1 if self.recipe.evaluation.where == "none" else 2
        return max(most, kept + adapters * snapshot_size(self.state(rounds)))
