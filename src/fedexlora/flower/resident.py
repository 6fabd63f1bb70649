"""The simulated clients of one process, around one model that stays loaded.

A node of a simulation has no configuration and no disk: it is a client of the recipe's partition,
by its number, and takes the total in every round.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedexlora.engine.local import LocalTrainer
from fedexlora.engine.observer import Observer
from fedexlora.engine.prepare import prepare
from fedexlora.engine.recipe import Recipe, load_recipe, parse_recipe
from fedexlora.errors import RecipeError, RunError
from fedexlora.exchange.shipment import receive, receive_own
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.untrusted import number
from fedexlora.flower.frames import Frame


@dataclass(slots=True)
class _Resident:
    """What one of the simulation's processes keeps: a model for all clients."""

    recipe: Mapping[str, Any]
    trainer: LocalTrainer
    held: tuple[bytes, GlobalState] | None = field(default=None)


_RESIDENT: list[_Resident] = []


def simulated(partition: int, frame: Frame, recipe: Path | None = None) -> Frame:
    """The answer of the client with this number, from 0.

    Args:
        partition: its number in the recipe's partition.
        frame: the server's request.
        recipe: where to read ``[data]``, if the server sent none.

    Raises:
        RunError: if the client cannot train.
        InputError: if the recipe names something that is not there.
    """
    resident = _resident(frame.header["recipe"], recipe)
    client = list(resident.trainer.num_examples)[partition]
    if frame.header["kind"] == "hello":
        return Frame({"client": client, "rows": resident.trainer.num_examples[client]})
    message = frame.parts["message"]
    if resident.held is None or resident.held[0] != message:
        try:
            resident.held = message, receive(None, message)
        except RunError as error:  # a piece, from a time when the clients were nodes with disks
            return Frame({"missed": str(error)})
    state = resident.held[1]
    if "own" in frame.parts:
        state = receive_own(state, client, frame.parts["own"])
    round_ = number(frame.header, "round")
    started = time.perf_counter()
    update = resident.trainer.update(client, state, round_, lambda *_: None)
    seconds = time.perf_counter() - started
    return Frame({"seconds": seconds, "keeps": False}, {"update": update})


def _resident(sent: Mapping[str, Any], recipe: Path | None) -> _Resident:
    if not _RESIDENT or _RESIDENT[0].recipe != sent:
        _RESIDENT.clear()
        _, trainer = prepare(_whole(sent, recipe), Observer())
        _RESIDENT.append(_Resident(sent, trainer))
    return _RESIDENT[0]


def _whole(sent: Mapping[str, Any], recipe: Path | None) -> Recipe:
    """The server's recipe with data: its own, or that of the app on this machine."""
    if "data" in sent:
        return Recipe.model_validate(sent)
    if recipe is None:
        raise RecipeError(
            "the server sends no data, and this app names none for simulated clients",
            ["give client_app the app's recipe"],
        )
    data = load_recipe(recipe).model_dump(mode="json", include={"data"}, exclude_none=True)
    return parse_recipe({**sent, **data}, "of the server")
