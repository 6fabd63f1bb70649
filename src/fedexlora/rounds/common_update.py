"""An update in the form in which a round adds it up, whatever its client trained.

Clients may have adapters of their own rank and scaling, and a late update was trained from an
earlier version. Both end here: every update has the common rank, by zeros, and the common scaling,
and what it was trained from stands beside it where that is not the common adapter. Heads of a late
update are moved to where those of the round's version are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.exchange.layout import each_once
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate


class CommonUpdate(Protocol):
    """One client's update; its tensors may be read from a file when they are asked for."""

    @property
    def client(self) -> str:
        """Whose it is."""

    def factors(self, module: str) -> Factors:
        """What the client trained, ``A (R, N)`` and ``B (M, R)``, in the common scaling."""

    def start(self, module: str) -> Factors | None:
        """What it was trained from, where that is not the common adapter of the version."""

    def head(self, name: str) -> Tensor:
        """A head or bias."""


@dataclass(frozen=True)  # no slots: ranks are kept
class CommonForm:
    """The rank and the scaling to which a round's updates are brought."""

    before: GlobalState
    """The version that the round starts from."""
    spec: AdapterSpec
    """The common adapter, and what of it an update has in this round."""
    specs: Mapping[str, AdapterSpec]
    """The adapters of the clients that have another one, by client, and the same of theirs."""

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """By module, the largest rank that any client has."""
        every = [self.spec, *each_once(self.specs)[0].values()]
        return {name: max(spec.modules[name].rank for spec in every) for name in self.spec.modules}

    def required(self) -> set[str]:
        """The tensors that an update of any client has."""
        factors = {f"{x}/{name}" for x in self.spec.trained for name in self.spec.modules}
        return factors | {f"dense/{name}" for name in self.spec.dense}

    def common(self, module: str) -> Factors:
        """The common adapter of the version, at the common rank."""
        return self.before.adapter[module].padded(self.ranks[module])

    def spec_of(self, client: str) -> AdapterSpec:
        """The adapter that a client trains."""
        return self.specs.get(client, self.spec)

    def scale(self, client: str, module: str) -> float:
        """A client's scaling over the common one."""
        if client not in self.specs:
            return 1.0
        own = self.specs[client].modules[module].scaling
        return own / self.spec.modules[module].scaling

    def tensors(self, update: ClientUpdate, start: GlobalState) -> dict[str, Tensor]:
        """The tensors of an update in the common form.

        Factors that are frozen are left out where they are those of the common adapter.

        Args:
            update: a checked update.
            start: what it was trained from.

        Returns:
            ``A/MODULE``, ``B/MODULE``, ``A0/MODULE``, ``B0/MODULE`` and ``dense/NAME``.
        """
        held = start.adapter_of(update.client)
        common = held is self.before.adapter
        found: dict[str, Tensor] = {}
        for name, old in held.items():
            pair = self._brought(update.client, name, update.factors(name, old))
            found |= {
                f"{letter}/{name}": pair.A if letter == "A" else pair.B
                for letter in "AB"
                if not common or letter in self.spec.trained
            }
            if not common:
                first = self._brought(update.client, name, old)
                found |= {f"A0/{name}": first.A, f"B0/{name}": first.B}
        for name in self.spec.dense:
            head = update.tensors[f"dense/{name}"]
            if start is not self.before:
                moved = self.before.dense[name].double() - start.dense[name].double()
                head = head.double() + moved
            found[f"dense/{name}"] = head
        return found

    def sent(self, update: CommonUpdate) -> dict[str, Factors]:
        """The factors as their client sent them, of its own ranks and scalings."""
        found = {}
        for name, module in self.spec_of(update.client).modules.items():
            pair = update.factors(name)
            scale = self.scale(update.client, name)
            own = Factors(pair.A[: module.rank], pair.B[:, : module.rank])
            # Of a rescaled pair, which is float64, the quotient rounds to what it was.
            found[name] = own.scaled(1.0 / scale).to(module.dtype)
        return found

    def factors_from(
        self, tensors: Mapping[str, Tensor], module: str, letters: tuple[str, str] = ("A", "B")
    ) -> Factors:
        """A module's factors among tensors of the common form.

        Raises:
            KeyError: if one that is trained is missing.
        """
        names = [f"{letter}/{module}" for letter in letters]
        if all(name in tensors for name in names):
            return Factors(*(tensors[name] for name in names))
        common, trained = self.common(module), self.spec.trained
        down, up = (
            tensors[name] if name in tensors or name[0] in trained else None for name in names
        )
        return Factors(common.A if down is None else down, common.B if up is None else up)

    def _brought(self, client: str, module: str, pair: Factors) -> Factors:
        """Factors of a client's own rank and scaling; what is not rescaled is not rounded."""
        scale = self.scale(client, module)
        if scale != 1.0:
            pair = pair.to(torch.float64).scaled(scale)
        return pair.padded(self.ranks[module])


@dataclass(frozen=True, slots=True)
class HeldUpdate:
    """An update whose tensors are in memory."""

    client: str
    form: CommonForm
    tensors: Mapping[str, Tensor]
    """From :meth:`CommonForm.tensors`."""

    @staticmethod
    def of(update: ClientUpdate, form: CommonForm, start: GlobalState | None = None) -> HeldUpdate:
        """A checked update, in the common form.

        Args:
            update: the update.
            form: of the round.
            start: what it was trained from, if that is not the version of the round.
        """
        return HeldUpdate(update.client, form, form.tensors(update, start or form.before))

    def factors(self, module: str) -> Factors:
        """As of :class:`CommonUpdate`."""
        return self.form.factors_from(self.tensors, module)

    def start(self, module: str) -> Factors | None:
        """As of :class:`CommonUpdate`."""
        if f"A0/{module}" not in self.tensors:
            return None
        return self.form.factors_from(self.tensors, module, ("A0", "B0"))

    def head(self, name: str) -> Tensor:
        """As of :class:`CommonUpdate`."""
        return self.tensors[f"dense/{name}"]
