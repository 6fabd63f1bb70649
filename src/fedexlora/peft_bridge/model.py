"""A live PEFT model as the algebra sees it: read an update, apply a version, measure what holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import hypot

import torch
from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.algebra.probes import Probes
from fedexlora.errors import BridgeError
from fedexlora.exchange.layout import adapter_tensors, each_once
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.version import first_id
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.fingerprint import base_fingerprint
from fedexlora.peft_bridge.inspect import mutates_base
from fedexlora.peft_bridge.modules import AdaptedModule
from fedexlora.peft_bridge.outline import ModelOutline
from fedexlora.peft_bridge.placement import Placement
from fedexlora.peft_bridge.weights import half_ulp, read_weight, write_weight

REMAINDER = "remainder"
"""The side adapter that holds the cumulative remainder."""
DIFFERENCE = "difference"
"""The side adapter that makes up for a client's own adapter."""
_ROWS = 1024
"""Rows of a weight that are held in float64 at a time."""


class AdaptedModel(ModelOutline):
    """One resident model, of which only adapters, heads and folded weights ever change.

    The cumulative remainder is either folded into the frozen weight, as ``W0 + scaling * total``
    recomputed from a copy of ``W0`` each time and never accumulated, or rides beside it as a
    frozen float32 adapter of PEFT's.

    Its arguments are those of :class:`~fedexlora.peft_bridge.outline.ModelOutline`.

    Raises:
        BridgeError: if the model cannot be aggregated exactly, with every reason.
    """

    def __init__(
        self,
        model: PeftModel,
        trained: tuple[str, ...] = ("A", "B"),
        placement: Placement = "auto",
        arithmetics: Sequence[Arithmetic] = (Arithmetic(),),
        adapter: str = "default",
    ) -> None:
        super().__init__(model, trained, placement, arithmetics, adapter)
        self.base_fingerprint = base_fingerprint(model, adapter, self._dense)
        self.untouched: dict[str, Tensor] = {}
        """By module whose remainder is folded: the frozen weight without it, as it is stored."""
        self.start = {name: pair for name, pair in self._live_factors().items() if _adds(pair)}
        """The factors of version 0 by module, where their product is not zero."""
        self.taken_out: Mapping[str, Factors] = (
            self.initial_state().adapter if mutates_base(model, adapter) else {}
        )
        """What an initialisation such as PiSSA moved from the original weights to the factors."""

    @property
    def lossy_fold(self) -> bool:
        """Whether a remainder is folded, as was asked for, into a weight that rounds it away."""
        return any(self.modules[name].weight.dtype != torch.float32 for name in self._folded)

    def initial_state(
        self,
        specs: Mapping[str, AdapterSpec] | None = None,
        seed: int = 0,
        *,
        truncated: bool = False,
    ) -> GlobalState:
        """Version 0: the adapter and heads as they are now, and no remainder.

        Args:
            specs: the clients with adapters of other ranks; they get new factors of their own.
                Those whose spec is one object share them.
            seed: of those.
            truncated: whether they get the first rows of A and columns of B of the common adapter
                instead, as of the same product in their scaling.
        """
        total = {
            name: LowRank.zeros(m.d_out, m.d_in, torch.float64)
            for name, m in self.spec.modules.items()
        }
        kept, shared = each_once(specs or {})
        adapter, dense = self._live_factors(), self.dense()
        own = {
            client: self._first_rows(adapter, spec) if truncated else self.fresh(spec, seed)
            for client, spec in kept.items()
        }
        own |= {client: own[name] for client, name in shared.items()}
        known = {"": self.spec, **(specs or {})}
        first = first_id(known, self.base_fingerprint, adapter, dense, own)
        return GlobalState(0, first, adapter, total, dense, own)

    def dense(self) -> dict[str, Tensor]:
        """Copies of the heads, biases and token rows, by name."""
        return {name: _copy(tensor) for name, tensor in self._dense.items()}

    def factors(self) -> dict[str, Factors]:
        """Copies of the factors as they are now, by module."""
        return self._live_factors()

    def update_tensors(self) -> dict[str, Tensor]:
        """Copies of everything that was trained, by the names of ``AdapterSpec.tensors``."""
        tensors = adapter_tensors(self._live_factors(), self.spec.trained)
        return tensors | {f"dense/{name}": tensor for name, tensor in self.dense().items()}

    @contextmanager
    def training_only(self, letters: Sequence[str]) -> Iterator[None]:
        """Only these factors, of ``("A", "B")``, get gradients while this is open."""
        found = [x for m in self.modules.values() for x in m.parameters().items()]
        before = [parameter.requires_grad for _, parameter in found]
        for letter, parameter in found:
            parameter.requires_grad_(letter in letters)
        try:
            yield
        finally:
            for (_, parameter), trained in zip(found, before, strict=True):
                parameter.requires_grad_(trained)

    @torch.no_grad()
    def fresh(self, spec: AdapterSpec, seed: int) -> dict[str, Factors]:
        """New factors of ``spec``'s ranks, as PEFT initialises them; the model stays as it is."""
        held, dense = self._live_factors(), self.dense()
        scalings = {name: module.scaling for name, module in self.modules.items()}
        init = self.peft_model.peft_config[self.adapter].init_lora_weights
        how = init if init == "gaussian" else True  # the others look at, or change, the weight
        set_seed(seed)
        for name, module in self.modules.items():
            wanted = spec.modules[name]
            zeros = Factors(
                torch.zeros(wanted.rank, wanted.d_in), torch.zeros(wanted.d_out, wanted.rank)
            )
            module.load(zeros, wanted.scaling)
            module.layer.reset_lora_parameters(self.adapter, how)
        made = self._live_factors()
        for name, module in self.modules.items():
            module.load(held[name], scalings[name])
        self._load_dense(dense)  # PEFT resets biases of factors too
        return made

    @torch.no_grad()
    def apply(self, state: GlobalState) -> None:
        """Become a version of the global model.

        Raises:
            BridgeError: if the state is one of another model: nothing is applied then.
        """
        self._check(state)
        for name, module in self.modules.items():
            if name in self._folded:
                self._fold(module, state.total[name])
            else:
                scaling = self.spec.modules[name].scaling
                module.set_side(REMAINDER, state.total[name], scaling)
        self.enter(state)

    @torch.no_grad()
    def enter(
        self,
        state: GlobalState,
        client: str | None = None,
        spec: AdapterSpec | None = None,
        *,
        makes_up: bool = True,
    ) -> None:
        """Set only adapter and heads: what a client starts a round from.

        Args:
            state: the version that was applied last.
            client: the client; None for the server's copy.
            spec: ranks and scalings of the client's adapter; by default the model's own.
            makes_up: whether what the client's own adapter lacks of the common one rides beside
                the weight.
        """
        own = state.own.get(client) if client is not None else None
        for name, module in self.modules.items():
            common = self.spec.modules[name].scaling
            if own is None:
                module.load(state.adapter[name], common)
                module.set_side(DIFFERENCE, None, common)
                continue
            scaling = (spec or self.spec).modules[name].scaling
            module.load(own[name], scaling)
            if not makes_up:
                module.set_side(DIFFERENCE, None, common)
                continue
            minus = own[name].to(torch.float64).scaled(-scaling / common)
            both = stack([state.adapter[name].to(torch.float64), minus])
            # Factors whatever their rank: they are the client's for a round, and never multiplied.
            module.set_side(DIFFERENCE, LowRank(both), common)
        self._load_dense(state.dense)

    @torch.no_grad()
    def image(self, name: str, probes: Probes) -> Tensor:
        """What the module really adds to its untouched weight, read back from the live model.

        It is the change of the frozen weight and the live factors of all active adapters with
        PEFT's live scalings.

        Args:
            name: the module.
            probes: what the matrix ``(M, N)`` is measured by; all unit vectors give it itself.

        Returns:
            Scaled, ``(M, q)``, float64, on the processor.
        """
        image = self.adapter_image(name, probes)
        if name in self.untouched:
            module = self.modules[name]
            now, before = module.matrix(read_weight(module.base)), self._untouched_matrix(name)
            probes.add_rows(image, len(now), lambda part: _wide(now[part]) - _wide(before[part]))
        return image

    @torch.no_grad()
    def adapter_image(self, name: str, probes: Probes) -> Tensor:
        """The same without the change of the frozen weight: what rides beside it."""
        module = self.modules[name]
        live = module.factors()
        image = probes.add(probes.zeros(live.shape), live, module.scaling)
        for slot in side_slots(module):
            side = module.side(slot)
            if side is not None:
                probes.add(image, side.value, module.side_scaling(slot))
        return image

    @torch.no_grad()
    def fold_error(self, name: str, total: LowRank) -> float:
        """``|W - W0 - scaling * total|`` of a folded module, whole, in groups of rows.

        Args:
            name: the module.
            total: the remainder that is folded, unscaled, ``(M, N)``.
        """
        module, value = self.modules[name], total.to(torch.float64).value
        now, before = module.matrix(read_weight(module.base)), self._untouched_matrix(name)
        scaling, found = self.spec.modules[name].scaling, []
        for start in range(0, len(now), _ROWS):
            part = slice(start, start + _ROWS)
            rows = value[part] if isinstance(value, Tensor) else value.B[part] @ value.A
            off = _wide(now[part]) - _wide(before[part]) - scaling * rows
            found.append(float(off.norm()))
        return hypot(*found)

    def fold_rounding(self, name: str) -> float:
        """The largest Frobenius norm that rounding ``name``'s folded weight once can cost.

        Half a unit in the last place of every entry of a float32 weight; 0 where nothing is
        folded, or where a weight is narrower, whose rounding is an error like any other.
        """
        weight = self.modules[name].weight
        if name not in self.untouched or weight.dtype != torch.float32:
            return 0.0
        return hypot(*(float(half_ulp(rows).norm()) for rows in torch.split(weight, _ROWS)))

    def _first_rows(self, adapter: Mapping[str, Factors], spec: AdapterSpec) -> dict[str, Factors]:
        """The first directions of an adapter of the model's own spec, in another's scaling."""
        found = {}
        for name, pair in adapter.items():
            wanted, common = spec.modules[name], self.spec.modules[name]
            scale = common.scaling / wanted.scaling
            found[name] = pair.first(wanted.rank).scaled(scale).to(wanted.dtype)
        return found

    def _load_dense(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._dense.items():
            parameter.copy_(values[name])

    def _live_factors(self) -> dict[str, Factors]:
        live = {name: module.factors() for name, module in self.modules.items()}
        return {name: Factors(_copy(pair.A), _copy(pair.B)) for name, pair in live.items()}

    def _untouched_matrix(self, name: str) -> Tensor:
        return self.modules[name].matrix(self.untouched[name])

    def _fold(self, module: AdaptedModule, total: LowRank) -> None:
        if total.is_zero and module.name not in self.untouched:
            return
        if module.name not in self.untouched:
            self.untouched[module.name] = read_weight(module.base)
        change = module.stored_weight(total.dense(torch.float64))
        scaling = self.spec.modules[module.name].scaling
        write_weight(module.base, _wide(self.untouched[module.name]) + scaling * change)

    def _check(self, state: GlobalState) -> None:
        faults = _differences(
            {name: (m.d_out, m.rank, m.d_in) for name, m in self.spec.modules.items()},
            {name: (f.shape[0], f.rank, f.shape[1]) for name, f in state.adapter.items()},
        )
        faults += _differences(
            {name: spec.shape for name, spec in self.spec.dense.items()},
            {name: tuple(tensor.shape) for name, tensor in state.dense.items()},
        )
        if faults:
            raise BridgeError("the global state does not belong to this model", faults)


def side_slots(module: AdaptedModule) -> list[str]:
    """The side adapters that a module has now."""
    return [slot for slot in (REMAINDER, DIFFERENCE) if module.side(slot) is not None]


def _adds(factors: Factors) -> bool:
    """Whether the product is anything but zero."""
    return bool(factors.A.any()) and bool(factors.B.any())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _wide(tensor: Tensor) -> Tensor:
    """In float64 on the processor: not every accelerator has that type."""
    return tensor.detach().cpu().double()


def _differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
