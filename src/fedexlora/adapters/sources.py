"""The adapters that go in: opened, checked against each other, and weighted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from fedexlora.errors import AdapterError
from fedexlora.exchange.adapter_records import SourceRecord
from fedexlora.exchange.spec import TensorSpec
from fedexlora.peft_bridge.adapter_file import AdapterFile, StoredModule, open_adapter
from fedexlora.peft_bridge.names import FACTOR_BIAS, bias_owner

Progress = Callable[[int, int], None]
"""Called with modules done and modules in all."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Sources:
    """Adapters of one base model that adapt the same layers."""

    adapters: tuple[AdapterFile, ...]
    shares: tuple[float, ...]
    """Weights that sum to one, in the order of the adapters."""
    modules: Mapping[str, StoredModule]
    """Every adapted layer, as the first adapter that has it stores it, layer 10 after layer 9."""
    dense: Mapping[str, TensorSpec]
    """Heads and biases, as the first adapter that has them stores them."""
    base: str
    """The base model's name."""

    def having(self, module: str) -> Iterator[tuple[AdapterFile, float]]:
        """The adapters that adapt a layer, and their shares."""
        pairs = zip(self.adapters, self.shares, strict=True)
        return ((adapter, share) for adapter, share in pairs if module in adapter.modules)

    def records(self) -> tuple[SourceRecord, ...]:
        """What went in."""
        return tuple(
            SourceRecord(
                adapter=str(adapter.folder),
                weight=share,
                missing=tuple(x for x in self.modules if x not in adapter.modules),
            )
            for adapter, share in zip(self.adapters, self.shares, strict=True)
        )


def open_sources(
    folders: Sequence[str | Path],
    weights: Sequence[float] | None,
    *,
    base: str | None = None,
    allow_missing: bool = False,
) -> Sources:
    """Open adapters and check that their mean means something.

    Args:
        folders: PEFT adapters.
        weights: one for each, positive; equal ones by default.
        base: what the base model is called, if the adapters call it by different names.
        allow_missing: take a layer that an adapter lacks for a zero update.

    Raises:
        AdapterError: naming every folder, module and setting that does not fit.
    """
    if not folders:
        raise AdapterError("no adapter is given")
    shares = _shares(weights, len(folders))
    adapters, faults = [], []
    for folder in folders:
        try:
            adapters.append(open_adapter(Path(folder)))
        except AdapterError as error:
            faults += [error.summary, *(f"  {fault}" for fault in error.faults)]
    if faults:
        raise AdapterError("these adapters cannot be aggregated", faults)
    modules: dict[str, StoredModule] = {}
    dense: dict[str, TensorSpec] = {}
    for adapter in adapters:
        modules = {**adapter.modules, **modules}
        dense = {**adapter.dense, **dense}
    for adapter in adapters:
        faults += _setting_faults(adapter, adapters[0], base)
        faults += _module_faults(adapter, modules, allow_missing)
        faults += _dense_faults(adapter, dense)
    if faults:
        raise AdapterError("these adapters do not fit together", faults)
    name = base or str(adapters[0].config.get("base_model_name_or_path") or "")
    ordered = dict(sorted(modules.items(), key=lambda item: _natural(item[0])))
    return Sources(tuple(adapters), shares, ordered, dense, name)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    given = [1.0] * count if weights is None else list(weights)
    faults = []
    if len(given) != count:
        faults.append(f"expected {count}, one for each adapter, found {len(given)}")
    faults += [
        f"weight {i}: expected a positive number, found {x}"
        for i, x in enumerate(given, 1)
        if not (isfinite(x) and x > 0)
    ]
    if faults:
        raise AdapterError("the weights do not fit the adapters", faults)
    total = sum(given)
    return tuple(x / total for x in given)


def _setting_faults(adapter: AdapterFile, first: AdapterFile, base: str | None) -> Iterator[str]:
    keys = ["task_type", "fan_in_fan_out", "trainable_token_indices"]
    if base is None:
        keys += ["base_model_name_or_path", "revision"]
    for key in keys:
        expected, found = first.config.get(key), adapter.config.get(key)
        if (expected or None) != (found or None):
            way = "; if both are the same model, say so by --base NAME" if "base" in key else ""
            yield f"{adapter.folder}: {key} is {found!r}, that of {first.folder} {expected!r}{way}"


def _module_faults(
    adapter: AdapterFile, modules: Mapping[str, StoredModule], allow_missing: bool
) -> Iterator[str]:
    if not allow_missing and (lacking := [x for x in modules if x not in adapter.modules]):
        yield (
            f"{adapter.folder}: {_listed(lacking)} not adapted, but by others; --allow-missing "
            f"takes what is missing for a zero update"
        )
    for name, module in adapter.modules.items():
        if module.layout != modules[name].layout:
            yield (
                f"{adapter.folder}: {name} has factors {_shapes(module)}, others "
                f"{_shapes(modules[name])}"
            )


def _dense_faults(adapter: AdapterFile, dense: Mapping[str, TensorSpec]) -> Iterator[str]:
    for name, spec in dense.items():
        found = adapter.dense.get(name)
        owner = bias_owner(name)
        if found is None and (owner is None or owner in adapter.modules):
            yield f"{adapter.folder}: {name} is missing, which others train"
        elif found is not None and found.shape != spec.shape:
            yield f"{adapter.folder}: {name}: {list(found.shape)}, others {list(spec.shape)}"
    if not any(name.endswith(FACTOR_BIAS) for name in dense):
        return
    if not adapter.config.get("lora_bias"):
        yield f"{adapter.folder}: lora_bias is off, but biases of factors are stored"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shapes(module: StoredModule) -> str:
    kind = "of an embedding " if module.embedding else ""
    return f"{kind}A {list(module.shapes['A'])}, B {list(module.shapes['B'])}"
