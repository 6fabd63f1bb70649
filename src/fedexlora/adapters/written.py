"""An adapter that was just written, read back: nothing in it may be ignored by PEFT."""

from __future__ import annotations

from pathlib import Path

from fedexlora.adapters.sources import Sources
from fedexlora.errors import AdapterError
from fedexlora.peft_bridge.adapter_file import open_adapter


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
