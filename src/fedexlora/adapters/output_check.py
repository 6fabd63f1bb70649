"""An adapter that was just written, read back: nothing in it may be ignored by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedexlora.adapters.sources import Sources
from fedexlora.errors import AdapterError, ExactnessError
from fedexlora.exchange.adapter_records import AdaptedModuleRecord
from fedexlora.peft_bridge.adapter_file import open_adapter
from fedexlora.peft_bridge.export_check import module_error


def check_written(folder: Path, sources: Sources) -> str | None:
    """Check names, ranks and shapes by PEFT's rules for the settings that lie beside them.

    Where the base's configuration is on this machine, PEFT loads the tensors onto its layers, as
    shapes without numbers.

    Args:
        folder: the new adapter.
        sources: what it was made of.

    Returns:
        The class of the base that the tensors were matched with; None if it is not here.

    Raises:
        AdapterError: if PEFT would ignore a tensor, or cannot load it.
    """
    written = open_adapter(folder)
    faults = list(written.notes)
    faults += [
        f"{name}: is in one of what was given and what was written, not in both"
        for name in sorted(
            (written.modules.keys() ^ sources.modules.keys())
            | (written.dense.keys() ^ sources.dense.keys())
        )
    ]
    if sources.known is not None and not faults:
        from fedexlora.peft_bridge.loading import loading_faults

        faults += loading_faults(sources.known.skeleton.model, folder)
    if faults:
        where = f" on {sources.known.name}" if sources.known else ""
        raise AdapterError(f"PEFT would not load the whole result{where}", faults)
    return sources.known.skeleton.class_name if sources.known else None


def check_held(folder: Path, sources: Sources, modules: Sequence[AdaptedModuleRecord]) -> None:
    """Hold every module of the new adapter against the plain float64 sum of what it was made of.

    Args:
        folder: the new adapter.
        sources: what it was made of.
        modules: what was stated of each: its error is what was left out on purpose.

    Raises:
        ExactnessError: naming every module that is off by more.
    """
    written, faults = open_adapter(folder), []
    for record in modules:
        terms = (
            (adapter.factors(record.module), share * adapter.modules[record.module].scaling)
            for adapter, share in sources.having(record.module)
        )
        faults += module_error(written, record.module, terms, record.error)[1]
    if faults:
        raise ExactnessError(f"{folder}: what is written is not the mean of the adapters", faults)
