"""The simulated clients of one process, around one model that stays loaded.

A node of a simulation has no configuration and no disk: it is a client of the partition of this
machine's own recipe, by its number, and takes a snapshot in every round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedexlora.errors import NodeError, RunError
from fedexlora.exchange.delivery import Passage, open_message, with_own
from fedexlora.exchange.node_faults import NodeFault
from fedexlora.exchange.untrusted import number
from fedexlora.flower.announcement import announced
from fedexlora.flower.frames import Frame
from fedexlora.flower.permission import local_recipe
from fedexlora.local.clients import LocalClients
from fedexlora.local.memory import ClientMemory
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import Recipe, load_recipe

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Resident:
    """What one of the simulation's processes keeps: a model for all clients."""

    recipe: Mapping[str, Any]
    trainer: LocalClients
    held: tuple[bytes, Passage] | None = field(default=None)


_RESIDENT: list[_Resident] = []


def simulated(
    partition: int, frame: Frame, own: Path | Recipe, memory: Path | None = None
) -> Frame:
    """The answer of the client with this number, from 0.

    Args:
        partition: its number in the recipe's partition.
        frame: the server's request.
        own: this machine's recipe, or its file; the server's must say the same.
        memory: the folder of what clients remember of the method.

    Raises:
        NodeError: if the server's recipe is another one, has no such client, or a method whose
            clients remember something where there is no folder for it.
        RunError: if the client cannot train.
        InputError: if the recipe names something that is not there.
    """
    resident = _resident(frame.header["recipe"], own)
    clients = list(resident.trainer.num_examples)
    if not 0 <= partition < len(clients):
        said = f"the recipe has {len(clients)} clients: there is no number {partition}"
        raise NodeError(NodeFault.TASK_REFUSED, said)
    client = clients[partition]
    if memory is None and resident.trainer.rule.remembers_at_clients:
        said = "clients remember something of this method: run it with fedexlora run"
        raise NodeError(NodeFault.TASK_REFUSED, said)
    if frame.header["kind"] == "hello":
        rows = resident.trainer.num_examples[client]
        return Frame({"client": client, "rows": rows, "keeps": False})
    message = frame.parts["message"]
    try:
        if resident.held is None or resident.held[0] != message:
            resident.held = message, open_message(message, announced(frame))
        passage = resident.held[1]
        state = passage.lead(None)
        if "own" in frame.parts:
            state = with_own(state, frame.parts["own"], client, passage.own)
    except RunError as error:  # steps, from a time when the clients were nodes with disks
        _log.warning("%s", error)
        return Frame({"missed": str(NodeFault.VERSION_MISSING)})
    round_ = number(frame.header, "round")
    started = time.perf_counter()
    remembered = None if memory is None else ClientMemory(memory)
    if frame.header["kind"] == "score":
        report = resident.trainer.report(client, state, remembered)
        spent = time.perf_counter() - started
        return Frame({"seconds": spent, "keeps": False}, {"report": report})
    update = resident.trainer.update(client, state, round_, lambda *_: None, remembered)
    seconds = time.perf_counter() - started
    return Frame({"seconds": seconds, "keeps": False}, {"update": update})


def _resident(sent: Mapping[str, Any], own: Path | Recipe) -> _Resident:
    if not _RESIDENT or _RESIDENT[0].recipe != sent:
        _RESIDENT.clear()
        recipe = local_recipe(sent, load_recipe(own) if isinstance(own, Path) else own)
        _, trainer = prepare(recipe, Observer())
        _RESIDENT.append(_Resident(sent, trainer))
    return _RESIDENT[0]
