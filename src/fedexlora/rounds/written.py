"""What a run leaves as PEFT adapters: the final model, the best one, and what clients sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedexlora.errors import BridgeError, RecipeError, VersionError
from fedexlora.exchange.files import new_folder, replace_bytes, writing
from fedexlora.exchange.state import GlobalState
from fedexlora.local.memory import ClientMemory
from fedexlora.peft_bridge.adapter_layout import AdapterLayout
from fedexlora.peft_bridge.global_writer import write_factors, write_global
from fedexlora.rounds.best import Selection
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.personal import personal_adapters
from fedexlora.rounds.prepared import Prepared
from fedexlora.rounds.spool import SpooledUpdate


def write_adapters(
    layout: AdapterLayout,
    folder: RunFolder,
    state: GlobalState,
    selection: Selection,
    observer: Observer,
    *,
    stopped: bool,
) -> None:
    """Write the final global model, and the best one, with what is known of both.

    Args:
        layout: how PEFT stores them.
        folder: the run's.
        state: the final version.
        selection: has the best one.
        observer: told if that cannot be read.
        stopped: whether the run has ended before its last round.
    """
    with writing(folder.adapter), new_folder(folder.adapter) as path:
        written = write_global(layout, state, path)
    said: dict[str, Any] = {"version": state.version, "stopped": stopped}
    said |= {"worst_module": written.module, "worst_error": written.error}
    if selection.best is not None:
        best = selection.best
        try:
            found = state if best.version == state.version else folder.store.state(best.version)
        except (VersionError, OSError) as error:
            observer.passed_over(f"{folder.best_adapter} is not written: {error}")
        else:
            with writing(folder.best_adapter), new_folder(folder.best_adapter) as path:
                write_global(layout, found, path)
            said["best"] = asdict(best)
    with writing(folder.adapter_record):
        replace_bytes(folder.adapter_record, json.dumps(said, indent=2).encode())


def write_personal(prepared: Prepared, folder: RunFolder, state: GlobalState) -> None:
    """Write the adapters of the clients whose memory is here, where each has a model of its own."""
    layout = prepared.layout
    found = personal_adapters(prepared.recipe.rule, state, ClientMemory(folder.memory))
    with writing(folder.adapters), new_folder(folder.adapters) as path:
        for client, own in found.items():
            (path / client).mkdir()
            spec = prepared.specs.get(client)
            write_factors(layout, own.factors, own.heads, path / client, spec)


def check_keep(prepared: Prepared) -> None:
    """Refuse to keep updates from which nobody could recompute the aggregate."""
    if prepared.layout.taken_out:
        raise BridgeError(
            "--keep-updates: factors on a base that their initialisation changed are no adapters",
            ["leave it out, or set lora.init_lora_weights = true"],
        )
    if prepared.recipe.rule.personal:
        raise RecipeError(
            f"--keep-updates: clients of {prepared.recipe.method.name} send no adapters",
            ["leave it out; each one's is in the run's folder adapters at the end"],
        )
    if prepared.recipe.federation.stale == "accept":
        raise RecipeError(
            "--keep-updates: a late update is a change of an earlier version, not an adapter",
            ["leave it out, or set federation.stale = 'refuse'"],
        )
    if prepared.recipe.federation.robust == "clip":
        raise RecipeError(
            "--keep-updates: a clipped update counts in part, and no adapter holds the rest",
            ["leave it out, or choose another federation.robust"],
        )


def keep_sent(folder: RunFolder, prepared: Prepared, updates: Sequence[SpooledUpdate]) -> None:
    """Store what clients sent so that anyone can recompute the aggregate without our code."""
    layout = prepared.layout
    for update in updates:
        sent = update.form.sent(update)
        dense = {name: update.head(name) for name in update.form.before.dense}
        round_ = update.form.before.version + 1
        kept = folder.round_updates(round_) / update.client
        with writing(kept), new_folder(kept) as path:
            write_factors(layout, sent, dense, path, prepared.specs.get(update.client))
            said = {"client": update.client, "round": round_, "weight": update.weight}
            (path / "client.json").write_text(json.dumps(said, indent=2), encoding="utf-8")


def forget_sent(updates: Sequence[SpooledUpdate]) -> None:
    """Keep nothing of the updates."""
