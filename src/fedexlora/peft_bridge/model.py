"""A live PEFT model as the algebra sees it: read an update, apply a version, measure what holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import BridgeError
from fedexlora.exchange.spec import AdapterSpec, TensorSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.inspect import AdaptedModule, adapted_modules, dense_parameters


class AdaptedModel:
    """One resident model, of which only the adapter, the heads and folded weights ever change.

    The cumulative remainder is folded into the frozen float32 weights as ``W0 + scaling * total``,
    recomputed from a copy of ``W0`` each time and never accumulated.

    Args:
        model: the PEFT model; owned and changed from now on.
        trained: the factors that are trained, ``("A", "B")`` or ``("B",)``; others are frozen.
        adapter: the name of the adapter in ``model``.

    Raises:
        BridgeError: if the model cannot be aggregated exactly, with every reason.
    """

    def __init__(
        self, model: PeftModel, trained: tuple[str, ...] = ("A", "B"), adapter: str = "default"
    ) -> None:
        self.peft_model = model
        self.adapter = adapter
        self.modules: dict[str, AdaptedModule] = adapted_modules(model, adapter)
        self._dense: dict[str, nn.Parameter] = dense_parameters(model, adapter)
        for module in self.modules.values():
            module.A.requires_grad_("A" in trained)
            module.B.requires_grad_("B" in trained)
        self.spec = AdapterSpec(
            {name: module.spec for name, module in self.modules.items()},
            {name: TensorSpec.of(tensor) for name, tensor in self._dense.items()},
            trained,
        )
        self._untouched: dict[str, Tensor] = {}

    def initial_state(self) -> GlobalState:
        """Version 0: the adapter and heads as they are now, and no remainder."""
        adapter = {
            name: Factors(_copy(module.A), _copy(module.B)) for name, module in self.modules.items()
        }
        total = {
            name: LowRank.zeros(m.d_out, m.d_in, torch.float32)
            for name, m in self.spec.modules.items()
        }
        return GlobalState(0, adapter, total, self.dense())

    def dense(self) -> dict[str, Tensor]:
        """Copies of the heads and biases, by name."""
        return {name: _copy(tensor) for name, tensor in self._dense.items()}

    def update_tensors(self) -> dict[str, Tensor]:
        """Copies of everything that was trained, by the names of ``AdapterSpec.tensors``."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            live = {"A": module.A, "B": module.B}
            tensors |= {f"{x}/{name}": _copy(live[x]) for x in self.spec.trained}
        return tensors | {f"dense/{name}": tensor for name, tensor in self.dense().items()}

    @torch.no_grad()
    def apply(self, state: GlobalState) -> None:
        """Become a version of the global model.

        Raises:
            BridgeError: if the state is one of another model: nothing is applied then.
        """
        self._check(state)
        self.load_trained(state)
        for name, module in self.modules.items():
            self._fold(module, state.total[name])

    @torch.no_grad()
    def load_trained(self, state: GlobalState) -> None:
        """Set only the adapter and the heads: what a client starts a round from."""
        for name, module in self.modules.items():
            module.A.copy_(state.adapter[name].A)
            module.B.copy_(state.adapter[name].B)
        for name, parameter in self._dense.items():
            parameter.copy_(state.dense[name])

    @torch.no_grad()
    def applied_update(self, name: str) -> Tensor:
        """What the module really adds to its untouched weight, read back from the live model.

        Returns:
            Scaled, ``(d_out, d_in)``, float64, on the processor: the change of the frozen weight
            plus PEFT's own ``get_delta_weight``.
        """
        module = self.modules[name]
        update = _wide(module.layer.get_delta_weight(self.adapter))
        if name in self._untouched:
            update = update + (_wide(module.weight) - _wide(self._untouched[name]))
        return module.as_stored(update)

    def fold_rounding(self, name: str) -> float:
        """The largest Frobenius norm that rounding ``name``'s folded weight once can cost.

        Half a unit in the last place of every entry; 0 where nothing is folded.
        """
        if name not in self._untouched:
            return 0.0
        size = self.modules[name].weight.detach().abs()
        ulp = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
        return float((_wide(ulp) / 2).norm())

    def _fold(self, module: AdaptedModule, total: LowRank) -> None:
        if total.is_zero and module.name not in self._untouched:
            return
        if module.name not in self._untouched:
            self._untouched[module.name] = module.weight.detach().clone()
        change = module.as_stored(total.dense(torch.float64))
        wide = _wide(self._untouched[module.name]) + module.scaling * change
        module.weight.copy_(wide.to(module.weight.dtype))

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
