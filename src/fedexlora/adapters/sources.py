"""The adapters that go in: opened, checked against each other, and weighted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from fedexlora.adapters.agreement import (
    TASKS,
    base_of,
    dense_faults,
    module_faults,
    setting_faults,
    task_of,
)
from fedexlora.adapters.known_base import KnownBase, known_base
from fedexlora.adapters.repeats import copies, is_zero
from fedexlora.errors import AdapterError
from fedexlora.exchange.adapter_records import SourceRecord
from fedexlora.exchange.spec import TensorSpec
from fedexlora.peft_bridge.adapter_file import AdapterFile, StoredModule, open_adapter

Progress = Callable[[int, int], None]
"""Called with modules done and modules in all."""


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
    task: str | None
    """PEFT's name of the task, if any adapter says it."""
    known: KnownBase | None
    """The base's layers, if its configuration is here."""

    def having(self, module: str) -> Iterator[tuple[AdapterFile, float]]:
        """The adapters that adapt a layer, and their shares."""
        pairs = zip(self.adapters, self.shares, strict=True)
        return ((adapter, share) for adapter, share in pairs if module in adapter.modules)

    def records(self) -> tuple[SourceRecord, ...]:
        """What went in."""
        same = copies(self.adapters)
        return tuple(
            SourceRecord(
                adapter=str(adapter.folder),
                weight=share,
                missing=tuple(x for x in self.modules if x not in adapter.modules),
                names=adapter.notes,
                zero=is_zero(adapter),
                same_as=None if first is None else str(self.adapters[first].folder),
            )
            for adapter, share, first in zip(self.adapters, self.shares, same, strict=True)
        )


def open_sources(
    folders: Sequence[str | Path],
    weights: Sequence[float] | None,
    *,
    base: str | None = None,
    task: str | None = None,
    allow_missing: bool = False,
) -> Sources:
    """Open adapters and check that their mean means something.

    Args:
        folders: PEFT adapters.
        weights: one for each, positive; equal ones by default.
        base: the base model, if the adapters call it by different names.
        task: PEFT's name of the task, if the adapters name different ones.
        allow_missing: take a layer that an adapter lacks for a zero update.

    Raises:
        AdapterError: naming every folder, module and setting that does not fit.
    """
    if not folders:
        raise AdapterError("no adapter is given")
    if task is not None and task not in TASKS:
        raise AdapterError(f"--task: expected one of {', '.join(TASKS)}, found {task!r}")
    shares = _shares(weights, len(folders))
    adapters = _opened(folders)
    faults = list(setting_faults(adapters, base, task))
    name = base or next(filter(None, (base_of(x.config) for x in adapters)), "")
    task = task or next(filter(None, (task_of(x.config) for x in adapters)), None)
    known = None if faults else known_base(name, adapters[0])
    if known:
        adapters = [known.named(adapter, faults) for adapter in adapters]
    modules: dict[str, StoredModule] = {}
    dense: dict[str, TensorSpec] = {}
    for adapter in adapters:
        modules = {**adapter.modules, **modules}
        dense = {**adapter.dense, **dense}
    for adapter in adapters:
        faults += module_faults(adapter, adapters, modules, allow_missing=allow_missing)
        faults += dense_faults(adapter, dense)
    if faults:
        raise AdapterError("these adapters do not fit together", faults)
    ordered = dict(sorted(modules.items(), key=lambda item: _natural(item[0])))
    return Sources(tuple(adapters), shares, ordered, dense, name, task, known)


def _opened(folders: Sequence[str | Path]) -> list[AdapterFile]:
    adapters, faults = [], []
    for folder in folders:
        try:
            adapters.append(open_adapter(Path(folder)))
        except AdapterError as error:
            faults += [error.summary, *(f"  {fault}" for fault in error.faults)]
    if faults:
        raise AdapterError("these adapters cannot be aggregated", faults)
    return adapters


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
