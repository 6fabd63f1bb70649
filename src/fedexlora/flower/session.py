"""One client at work: it answers the server's requests around one loaded model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedexlora import __version__
from fedexlora.errors import BridgeError, DataError, NodeError, RecipeError, RunError
from fedexlora.exchange.delivery import open_message, with_own
from fedexlora.exchange.digest import known_digest
from fedexlora.exchange.files import new_folder, replace_bytes
from fedexlora.exchange.layout import unpack_finite
from fedexlora.exchange.node_faults import NodeFault
from fedexlora.exchange.state import GlobalState, state_from, state_tensors
from fedexlora.exchange.untrusted import number, short
from fedexlora.exchange.wire import pack
from fedexlora.flower.announcement import announced
from fedexlora.flower.answer_file import AnswerFile
from fedexlora.flower.fault_frames import fault_frame
from fedexlora.flower.frames import PROTOCOL, Frame
from fedexlora.flower.node import Node
from fedexlora.flower.permission import local_recipe
from fedexlora.local.clients import LocalClients
from fedexlora.local.memory import ClientMemory
from fedexlora.peft_bridge.export import origin_of, save_factors
from fedexlora.peft_bridge.origin import Statement
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare_client

_log = logging.getLogger(__name__)


class Session:
    """What a client keeps from one message to the next: the model, its rows, the version it holds.

    Args:
        node: the client's own configuration.
        stored: where the version that it holds is kept.
    """

    def __init__(self, node: Node, stored: Path) -> None:
        self.node = node
        self._stored = stored
        self._last_answer = AnswerFile(node)
        self._recipe: Mapping[str, Any] | None = None
        self._trainer: LocalClients | None = None
        self._origin: tuple[Statement, bytes] | None = None
        self._held = _read(stored)

    def answer(self, frame: Frame) -> Frame:
        """The reply to one of the server's requests; it never raises, and says faults as codes."""
        kinds: Mapping[object, Callable[[Frame], Frame]]
        kinds = {"hello": self._hello, "train": self._train, "score": self._score}
        kinds |= {"origin": self._send_origin}
        try:
            _check_peer(frame.header)
            kind = frame.header.get("kind")
            if not isinstance(kind, str) or kind not in kinds:
                raise NodeError(NodeFault.REQUEST_INVALID, f"no such request: {short(kind)}")
            return kinds[kind](frame)
        except Exception as error:  # noqa: BLE001 - the boundary of a client: its faults are its own
            return fault_frame(error)

    def _hello(self, frame: Frame) -> Frame:
        """Load what the recipe names, and say what is there."""
        trainer, client = self._ready(frame.header), self.node.client
        rows = trainer.num_examples[client]
        _log.info("ready as %r: %d rows, base %s", client, rows, trainer.model.base_fingerprint)
        said: dict[str, Any] = {"client": client, "rows": rows}
        if self._origin is not None:  # also to a server that knows the base: others may come late
            said["origin"] = self._origin[0].header()
        return Frame(said)

    def _send_origin(self, frame: Frame) -> Frame:
        """Send version 0, as this node has it, to a server without a model."""
        self._ready(frame.header)
        return Frame({}, {"origin": self._begun()[1]})

    def _begun(self) -> tuple[Statement, bytes]:
        """Version 0, as it was when the model was loaded.

        Raises:
            NodeError: if the recipe has the server score, which then has a model of its own.
        """
        if self._origin is None:
            raise NodeError(NodeFault.REQUEST_INVALID, "the server should have the base model")
        return self._origin

    def _train(self, frame: Frame) -> Frame:
        """Train and send; a request that comes again gets the same answer again.

        Also where the worker was killed in between, or the server.
        """
        if (known := self._last_answer.read(frame)) is not None:
            _log.info("round %s: answered as before", short(frame.header.get("round")))
            return known
        answer = self._trained(frame)
        if answer.parts:
            self._last_answer.write(frame, answer)
        return answer

    def _score(self, frame: Frame) -> Frame:
        """Come to the final version, and say what it is worth on this node's rows."""
        trainer, client = self._ready(frame.header), self.node.client
        held = self._landed(frame, _round_of(frame))
        if held is None:
            return Frame({"missed": str(NodeFault.VERSION_MISSING)})
        started = time.perf_counter()
        with _told_as(Exception, NodeFault.TRAINING_FAILED):
            memory = ClientMemory(self.node.home / "memory", _run_of(frame))
            report = trainer.report(client, held, memory)
            if trainer.rule.personal:
                self._save_own(trainer, held, memory)
        _log.info("scored version %d", held.version)
        return Frame({"seconds": time.perf_counter() - started}, {"report": report})

    def _save_own(self, trainer: LocalClients, held: GlobalState, memory: ClientMemory) -> None:
        """Write the model of this node, which nobody else has, as a PEFT adapter."""
        own, folder = trainer.trainables(self.node.client, held, memory), self.node.home / "adapter"
        with new_folder(folder) as path:
            save_factors(trainer.model, own.factors, own.heads, path)
        _log.info("this node's own adapter: %s", folder)

    def _trained(self, frame: Frame) -> Frame:
        trainer, client = self._ready(frame.header), self.node.client
        round_ = _round_of(frame)
        held = self._landed(frame, round_)
        if held is None:
            return Frame({"missed": str(NodeFault.VERSION_MISSING)})
        _log.info("round %d: training from version %d", round_, held.version)
        started = time.perf_counter()
        with _told_as(Exception, NodeFault.TRAINING_FAILED):
            memory = ClientMemory(self.node.home / "memory", _run_of(frame))
            update = trainer.update(client, held, round_, lambda *_: None, memory)
        seconds = time.perf_counter() - started
        _log.info("round %d: trained in %.1f s", round_, seconds)
        return Frame({"seconds": seconds}, {"update": update})

    def _ready(self, header: Mapping[str, Any]) -> LocalClients:
        """The model and rows of the server's recipe, loaded once."""
        sent = header.get("recipe")
        if self._trainer is None or sent != self._recipe:
            self._trainer = None  # two models may not fit in memory
            recipe = local_recipe(sent, self.node)
            share, client = self.node.data.share, self.node.client
            with (
                _told_as((DataError, RecipeError), NodeFault.TASK_REFUSED),
                _told_as(BridgeError, NodeFault.MODEL_UNFIT),
            ):
                own = self.node.data.validation is not None
                self._trainer = prepare_client(
                    recipe, client, share, Observer(), own_validation=own
                )
            self._recipe, self._origin = sent, None
            if recipe.evaluation.where != "server":
                self._origin = origin_of(self._trainer.model).encode()
        if header.get("base") is None and header.get("kind") == "hello":
            return self._trainer  # nobody has said yet which base it is to be
        found, wanted = self._trainer.model.base_fingerprint, header.get("base")
        if found != wanted:
            said = f"the base model is another one: {found} here, {short(wanted)} at the server"
            raise NodeError(NodeFault.BASE_DIFFERS, said)
        return self._trainer

    def _landed(self, frame: Frame, round_: int) -> GlobalState | None:
        """The version of the round; None if this node cannot come to it from what it holds."""
        try:
            return self._land(frame)
        except RunError as error:
            _log.warning("round %d: %s", round_, error)
            return None

    def _land(self, frame: Frame) -> GlobalState:
        """Come to the version of the round, and make it durable."""
        held = self._held
        passage = open_message(frame.parts["message"], announced(frame))
        state = passage.lead(held)
        if held is None or held.id != state.id:
            header = {"version": state.version, "id": state.id}
            replace_bytes(self._stored, pack(state_tensors(state), header))
        self._held = state
        if "own" in frame.parts:
            return with_own(state, frame.parts["own"], self.node.client, passage.own)
        return state


def _check_peer(header: Mapping[str, Any]) -> None:
    """Refuse a server that speaks otherwise, or whose arithmetic may differ.

    Raises:
        NodeError: naming both versions.
    """
    theirs, ours = (header.get("protocol"), header.get("fedexlora")), (PROTOCOL, __version__)
    if theirs != ours:
        raise NodeError(
            NodeFault.RELEASE_DIFFERS,
            f"the server runs fedexlora {short(theirs[1])} (protocol {short(theirs[0])}), "
            f"this node {ours[1]} (protocol {ours[0]}): install the same version",
        )


def _round_of(frame: Frame) -> int:
    """The round of a request to train, or to score, that is whole.

    Raises:
        NodeError: if it is not.
    """
    with _told_as(ValueError, NodeFault.REQUEST_INVALID):
        if "message" not in frame.parts:
            raise ValueError("a request has no message")
        return number(frame.header, "round")


def _run_of(frame: Frame) -> str:
    """What tells the run from others.

    Raises:
        NodeError: if the request does not say.
    """
    run = frame.header.get("run")
    if not isinstance(run, str):
        raise NodeError(NodeFault.REQUEST_INVALID, f"a request of no run: {short(run)}")
    return run


@contextmanager
def _told_as(
    kinds: type[Exception] | tuple[type[Exception], ...], code: NodeFault
) -> Iterator[None]:
    """Give errors of these kinds the code that the server is told; memory has one of its own.

    Raises:
        NodeError: in their place.
    """
    try:
        yield
    except NodeError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise NodeError(NodeFault.OUT_OF_MEMORY, f"{type(error).__name__}: {error}") from error
    except kinds as error:
        raise NodeError(code, f"{type(error).__name__}: {error}") from error


def _read(path: Path) -> GlobalState | None:
    """The version that was held before a restart; None if there is none, or it is damaged."""
    try:
        tensors, header = unpack_finite(path.read_bytes())
        return state_from(number(header, "version"), known_digest(header["id"]), tensors)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, OSError) as error:
        _log.warning("%s cannot be read, so a snapshot is needed: %s", path, error)
        return None
