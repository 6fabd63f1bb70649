"""The two apps that Flower runs: the server's, and a node's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedexlora.errors import NodeError
from fedexlora.exchange.node_faults import NodeFault
from fedexlora.flower.fault_frames import fault_frame
from fedexlora.flower.frames import Frame, from_records, to_records
from fedexlora.texts import outside

if TYPE_CHECKING:
    from fedexlora.rounds.recipe import Recipe

_log = logging.getLogger(__name__)
_NODE = "fedexlora-node"
"""The key of a SuperNode's ``--node-config`` that names the node's configuration."""


def client_app(recipe: Path | Recipe | None = None, memory: Path | None = None) -> ClientApp:
    """The app of a node; its SuperNode is started with ``--node-config 'fedexlora-node="FILE"'``.

    A node of Flower's simulation on this machine has no such file: it is the client of the recipe's
    partition with its number, in this process. Any other node without one is refused.

    Args:
        recipe: what simulated nodes run, if the server's recipe is the same; other nodes read
            nothing of it.
        memory: a folder for what simulated nodes remember of the method, of one run.
    """
    app = ClientApp()

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        return _answer(message, context, recipe, memory)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, context, recipe, memory)

    return app


def server_app(recipe: Path) -> ServerApp:
    """The app of the server: it runs a recipe on the nodes of the federation.

    Its run configuration: ``out``, the run's folder on the server; ``nodes``, how many to wait for
    before round 1; ``wait``, for how many seconds; ``keep-updates``;
    ``authenticated``, see :class:`fedexlora.flower.server.Settings`. A run that is in ``out``
    already is continued.

    Args:
        recipe: the recipe's file.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fedexlora.local.notices import quiet_libraries

        quiet_libraries()
        from fedexlora.flower.server import LogLines, Settings, serve
        from fedexlora.rounds.recipe import load_recipe

        _log_to_stdout()
        result = serve(grid, load_recipe(recipe), Settings.of(context.run_config), LogLines())
        _log.info("the final global model, as one PEFT adapter: %s", result.adapter)

    return app


def _answer(
    message: Message,
    context: Context,
    recipe: Path | Recipe | None,
    memory: Path | None = None,
) -> Message:
    """The reply; nothing is raised, as Flower would send the error's text to the server."""
    try:
        reply = _responder(context, recipe, memory)(_request(message))
    except Exception as error:  # noqa: BLE001 - its text must not leave the node
        reply = fault_frame(error)
    return Message(to_records(reply), reply_to=message)


def _request(message: Message) -> Frame:
    try:
        frame = from_records(message.content)
    except ValueError as error:
        raise NodeError(NodeFault.REQUEST_INVALID, outside(str(error))) from error
    message.content = RecordDict()  # Flower keeps the message until it has the answer
    return frame


def _responder(
    context: Context, recipe: Path | Recipe | None, memory: Path | None
) -> Callable[[Frame], Frame]:
    file = context.node_config.get(_NODE)
    if file is not None:
        from fedexlora.flower.worker import ask_worker

        return lambda frame: ask_worker(Path(str(file)), frame)
    partition: Any = context.node_config.get("partition-id")
    if partition is None or recipe is None or not _in_simulation():
        raise NodeError(
            NodeFault.NOT_CONFIGURED,
            f"this SuperNode has no {_NODE!r} in its --node-config",
            [f"start it with --node-config '{_NODE}=\"/path/to/node.toml\"'"],
        )
    from fedexlora.flower.resident import simulated

    return lambda frame: simulated(int(partition), frame, recipe, memory)


def _in_simulation() -> bool:
    """Whether this process is one of Flower's simulation, which are Ray's.

    A SuperNode may have a ``partition-id`` as well, and the app's recipe comes from the server:
    neither says that this machine's operator has agreed to it.
    """
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _log_to_stdout() -> None:
    """Have what the run says in the log that ``flwr log`` shows."""
    logger = logging.getLogger("fedexlora")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
