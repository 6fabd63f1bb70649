"""The two apps that Flower runs: the server's, and a node's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedexlora.errors import FedexLoraError, RecipeError
from fedexlora.flower.frames import Frame, from_records, to_records

_log = logging.getLogger(__name__)
_NODE = "fedexlora-node"
"""The key of a SuperNode's ``--node-config`` that names the node's configuration."""


def client_app(recipe: Path | None = None) -> ClientApp:
    """The app of a node; its SuperNode is started with ``--node-config 'fedexlora-node="FILE"'``.

    A node of a simulation has no such file: it is the client of the recipe's partition with its
    number, in this process.

    Args:
        recipe: the app's own recipe, of which simulated nodes read ``[data]``; other nodes read
            nothing of it.
    """
    app = ClientApp()

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        return _answer(message, context, recipe)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, context, recipe)

    return app


def server_app(recipe: Path) -> ServerApp:
    """The app of the server: it runs a recipe on the nodes of the federation.

    Its run configuration: ``out``, the run's folder on the server; ``nodes``, how many to wait for
    before round 1; ``wait``, for how many seconds; ``keep-updates``. A run that is in ``out``
    already is continued.

    Args:
        recipe: the recipe's file.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fedexlora.engine.quiet import quiet_libraries

        quiet_libraries()
        from fedexlora.engine.recipe import load_recipe
        from fedexlora.flower.server import LogLines, Settings, serve

        _log_to_stdout()
        result = serve(grid, load_recipe(recipe), Settings.of(context.run_config), LogLines())
        _log.info("the final global model, as one PEFT adapter: %s", result.adapter)

    return app


def _answer(message: Message, context: Context, recipe: Path | None) -> Message:
    try:
        frame = from_records(message.content)
        reply = _responder(context, recipe)(frame)
    except (FedexLoraError, ValueError) as error:
        _log.error("%s", error)
        reply = Frame({"failure": str(error)})
    return Message(to_records(reply), reply_to=message)


def _responder(context: Context, recipe: Path | None) -> Callable[[Frame], Frame]:
    file = context.node_config.get(_NODE)
    if file is not None:
        from fedexlora.flower.worker import ask_worker

        return lambda frame: ask_worker(Path(str(file)), frame)
    partition: Any = context.node_config.get("partition-id")
    if partition is None:
        raise RecipeError(
            f"this SuperNode has no {_NODE!r} in its --node-config",
            [f"start it with --node-config '{_NODE}=\"/path/to/node.toml\"'"],
        )
    from fedexlora.flower.resident import simulated

    return lambda frame: simulated(int(partition), frame, recipe)


def _log_to_stdout() -> None:
    """Have what the run says in the log that ``flwr log`` shows."""
    logger = logging.getLogger("fedexlora")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
