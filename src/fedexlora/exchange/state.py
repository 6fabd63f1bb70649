"""The global model beside its untouched base: adapter, cumulative remainder, heads, version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import GapError, HistoryError, VersionError
from fedexlora.exchange.layout import (
    adapter_tensors,
    dense_from,
    dense_tensors,
    each_once,
    lowrank_from,
    lowrank_tensors,
    own_from,
    own_tensors,
    refuse_others,
)
from fedexlora.exchange.step import Step, joined
from fedexlora.exchange.untrusted import short
from fedexlora.exchange.version import Adapter, digests_of


@dataclass(frozen=True)  # no slots: digests are kept
class GlobalState:
    """Version ``t`` of the global model: ``base + scaling * (total + B A)`` in every module.

    A client with an adapter of its own, ``(A_c, B_c)`` with scaling ``s_c``, holds the same model:
    it adds ``scaling * (total + B A) - s_c B_c A_c`` to the base and its adapter to that. Where the
    method does not make up for such adapters, it holds ``base + scaling * total`` and its adapter.
    """

    version: int
    """The number of rounds aggregated so far."""
    id: str
    """Which version it is: equal for all that have the same steps, however they add them up."""
    adapter: Adapter
    """The factors that clients without their own continue from, by module."""
    total: Mapping[str, LowRank]
    """The cumulative remainder by module, unscaled, float64: rounds add up without drift."""
    dense: Mapping[str, Tensor]
    """Trained tensors that are not factors, by name: heads and biases."""
    own: Mapping[str, Adapter] = field(default_factory=dict)
    """By client and module: the adapters of clients that do not continue from the common one. Those
    of equal ranks and scalings may share one, which is one object then, held and stored once."""

    def changed(self, own: Mapping[str, Adapter]) -> tuple[dict[str, Adapter], dict[str, str]]:
        """What a step to a version of these own adapters says of them.

        Args:
            own: the adapters of all clients that have their own; those that do not change are the
                objects of this version.

        Returns:
            Those that change, and the digests of all.
        """
        changed = {c: found for c, found in own.items() if self.own.get(c) is not found}
        new = digests_of(changed)
        return changed, {c: new[c] if c in new else self.own_digests[c] for c in own}

    def advance(self, steps: Sequence[Step]) -> GlobalState:
        """The version that steps lead to; those that are held already are passed over.

        Server and clients both come from one version to the next through here. Each piece is added
        once, in order; factors and heads are those of the last step that has them.

        Raises:
            GapError: if the steps begin after the next version, or end before this one.
            HistoryError: if they belong to another history than this version.
            VersionError: if they are of another model.
        """
        if not (missing := missing_steps(self.version, self.id, steps)):
            return self
        last = missing[-1]
        try:
            own, digests = self._owned(missing)
            adapter, dense = self.adapter, self.dense
            for step in missing:
                adapter = step.adapter(adapter) if step.factors else adapter
                dense = self._heads(step.dense) if step.dense else dense
            total = self._total(missing)
        # RuntimeError: a decomposition of finite numbers that overflow.
        except (ValueError, RuntimeError) as error:
            raise VersionError(f"step {last.version} is one of another model: {error}") from error
        after = GlobalState(last.version, last.id, adapter, total, dense, own)
        after.__dict__["own_digests"] = digests  # what has not changed is not hashed again
        return after

    @cached_property
    def own_digests(self) -> Mapping[str, str]:
        """The digests of the clients' own adapters."""
        return digests_of(self.own)

    @property
    def shared(self) -> dict[str, str]:
        """By client of whose adapter another one, the first that has it, has the name: that one."""
        return each_once(self.own)[1]

    def adapter_of(self, client: str) -> Adapter:
        """The factors that a client continues from, by module."""
        return self.own.get(client, self.adapter)

    def start(self) -> GlobalState:
        """What clients began to train from: this version without the remainder."""
        return replace(self, total={})

    def common(self) -> GlobalState:
        """What all clients hold alike: this version without the clients' own adapters."""
        return replace(self, own={})

    def _owned(self, steps: Sequence[Step]) -> tuple[dict[str, Adapter], dict[str, str]]:
        """The own adapters of clients after steps, and their digests."""
        own, digests = dict(self.own), dict(self.own_digests)
        for step in steps:
            read = {client: own_adapter(x, self.adapter) for client, x in step.own.items()}
            changed = read | {client: read[name] for client, name in step.shared.items()}
            own |= changed
            digests |= digests_of(changed)
        return own, digests

    def _total(self, steps: Sequence[Step]) -> dict[str, LowRank]:
        total = dict(self.total)
        for step in steps:
            for name, piece in step.pieces.items():
                if name not in total or total[name].shape != piece.shape:
                    raise ValueError(f"the piece of {name} is {piece.shape}")
                total[name] = total[name].accumulate(piece)
        return total

    def _heads(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        read = dict(dense)
        held, found = ({n: tuple(t.shape) for n, t in x.items()} for x in (self.dense, read))
        if held != found:
            raise ValueError(f"heads: expected {short(held)}, found {short(found)}")
        return read


def missing_steps(version: int, id_: str, steps: Sequence[Step]) -> Sequence[Step]:
    """The steps that a holder of a version lacks.

    Args:
        version: what is held.
        id_: its id.
        steps: one after the other.

    Raises:
        GapError: if the steps begin after the next version, or end before the one that is held.
        HistoryError: if they belong to another history than the version that is held.
    """
    since, last = steps[0].version - 1, steps[-1].version
    if not since <= version <= last:
        raise GapError(
            f"steps lead from version {since} to {last}, but the receiver holds version {version}"
        )
    reached = steps[0].previous if version == since else steps[version - since - 1].id
    if reached != id_:
        raise HistoryError(
            f"version {version} of the receiver is not the server's: {id_} there, {reached} here"
        )
    return steps[version - since :]


def state_tensors(state: GlobalState) -> dict[str, Tensor]:
    """Every tensor of a state by name, as stored; what clients share is there once."""
    tensors = lowrank_tensors("total", state.total) | adapter_tensors(state.adapter)
    return tensors | own_tensors(each_once(state.own)[0]) | dense_tensors(state.dense)


def state_from(
    version: int,
    id_: str,
    tensors: Mapping[str, Tensor],
    shared: Mapping[str, str] | None = None,
) -> GlobalState:
    """What :func:`state_tensors` wrote.

    Args:
        version: the version.
        id_: its id.
        tensors: by name.
        shared: as :attr:`GlobalState.shared`.

    Raises:
        ValueError: if a factor is missing, or shapes do not fit together.
    """
    adapter = adapter_from(tensors)
    total = total_from(tensors, adapter)
    if narrow := [name for name, matrix in total.items() if matrix.value.dtype != torch.float64]:
        raise ValueError(f"the total is not float64 for {narrow}")
    kept = {client: own_adapter(x, adapter) for client, x in own_from(tensors).items()}
    own = kept | {client: kept[name] for client, name in (shared or {}).items()}
    state = GlobalState(version, id_, adapter, total, dense_from(tensors), own)
    refuse_others(tensors, state_tensors(state))
    return state


def adapter_from(tensors: Mapping[str, Tensor]) -> Adapter:
    """The common adapter among tensors.

    Raises:
        ValueError: if a factor is missing.
    """
    modules = [name.removeprefix("A/") for name in tensors if name.startswith("A/")]
    if missing := [name for name in modules if f"B/{name}" not in tensors]:
        raise ValueError(f"factor B is missing for {short(missing)}")
    return {name: Factors(tensors[f"A/{name}"], tensors[f"B/{name}"]) for name in modules}


def total_from(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, LowRank]:
    """The cumulative remainder of an adapter's modules among tensors; absent is zero.

    Raises:
        ValueError: if a matrix has another shape than its module, or is of none.
    """
    found = lowrank_from("total", tensors)
    for name, matrix in found.items():
        if name not in adapter or matrix.shape != adapter[name].shape:
            raise ValueError(f"the total of {short(name)} is {matrix.shape}: of no module")
    zeros = {name: LowRank.zeros(*pair.shape, torch.float64) for name, pair in adapter.items()}
    return {name: found.get(name, zero) for name, zero in zeros.items()}


def own_adapter(own: Adapter, common: Adapter) -> Adapter:
    """The adapter of a client of its own, held against the common one; its rank may be another.

    Raises:
        ValueError: if it has other modules, or factors of another shape.
    """
    if own.keys() != common.keys():
        raise ValueError(f"an adapter of other modules: {short(sorted(own))}")
    return joined(adapter_tensors(own), common)
