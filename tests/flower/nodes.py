"""A grid whose nodes answer in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedexlora.flower.frames import Frame, from_records, to_records

Answer = Callable[[Frame], Frame | RecordDict | Error | None]
"""A node: its reply, bare records, Flower's error, or nothing."""


@dataclass
class FakeGrid(Grid):
    """Nodes by id; what a test changes takes effect at the next message."""

    nodes: dict[int, Answer]
    keys: dict[int, bytes] = field(default_factory=dict)
    """Public keys by node; a node without one is told by its id."""
    pushed: list[tuple[int, Frame]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._replies: dict[str, list[Message]] = {}
        self._count = 0

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: object, **kwargs: object) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=n, public_key=self.keys.get(n, b"")) for n in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.nodes:
                ids.append(None)
                continue
            self._count += 1
            key = f"message-{self._count}"
            message.metadata.__dict__["_message_id"] = key
            frame = from_records(message.content)
            self.pushed.append((node, frame))
            answer = self.nodes[node](frame)
            if answer is not None:
                self.reply(message, answer)
            ids.append(key)
        return ids

    def reply(self, message: Message, answer: Frame | RecordDict | Error) -> None:
        content = to_records(answer) if isinstance(answer, Frame) else answer
        key = message.metadata.message_id
        self._replies.setdefault(key, []).append(Message(content, reply_to=message))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for key in message_ids:
            if self._replies.get(key):
                found.append(self._replies[key].pop(0))
        return found
