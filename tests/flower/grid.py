"""A Flower grid that calls client apps directly, and clients that say what a test tells them to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import nn

from fedexlora.flower import load_arrays, update_arrays

WEIGHTS = {11: 1, 12: 2, 13: 5}
"""Training examples by node."""

Train = Callable[[Message], RecordDict]


class DirectGrid(Grid):
    """Nodes in this process; an exception becomes an error reply, as in Flower's."""

    run = None

    def __init__(self, apps: dict[int, ClientApp]) -> None:
        self.apps = apps
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in apps}

    def set_run(self, run: object) -> None: ...

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.apps)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return [reply for message in messages for reply in self.answers(message)]

    def answers(self, message: Message) -> Iterator[Message]:
        node = message.metadata.dst_node_id
        try:
            yield self.apps[node](message, self.contexts[node])
        except Exception as error:  # noqa: BLE001 - so does Flower
            yield Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)


def app(train: Train, evaluate: Train | None = None) -> ClientApp:
    """A client app of two functions from a message to the content of its reply."""
    made = ClientApp()

    @made.train()
    def _train(msg: Message, context: Context) -> Message:
        return Message(train(msg), reply_to=msg)

    @made.evaluate()
    def _evaluate(msg: Message, context: Context) -> Message:
        metrics = {"eval_loss": 1.0, "num-examples": WEIGHTS[msg.metadata.dst_node_id]}
        content = evaluate(msg) if evaluate else RecordDict({"metrics": MetricRecord(metrics)})
        return Message(content, reply_to=msg)

    return made


def disturb(model: nn.Module, seed: int) -> None:
    """Training that goes far, and nowhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def content(arrays: ArrayRecord, node: int, **metrics: float) -> RecordDict:
    """A reply as Flower's own apps make it."""
    values = {"train_loss": 1.0, "num-examples": WEIGHTS[node]} | metrics
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(values)})


def trainer(
    make: Callable[[], nn.Module], after: Callable[[Message, nn.Module], None] | None = None
) -> Train:
    """A client that follows the two lines of the documentation."""

    def train(msg: Message) -> RecordDict:
        node, model = msg.metadata.dst_node_id, make()
        load_arrays(model, msg.content["arrays"])
        disturb(model, 100 * msg.content["config"]["server-round"] + node)
        if after:
            after(msg, model)
        arrays = update_arrays(model, msg, num_examples=WEIGHTS[node], loss=1.0)
        return content(arrays, node)

    return train
