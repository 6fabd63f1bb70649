"""What came back from Flower's nodes: one usable reply of each, and every other one by name."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

from flwr.app import Message, MetricRecord, RecordDict

from fedexlora.exchange.untrusted import short
from fedexlora.texts import few, outside

_METRICS, _NAME, _VALUES = 100, 100, 1000
"""Of a reply: metrics, characters of a metric's name, and numbers of a metric that is a list."""
logger = logging.getLogger("flwr")
"""Flower's own, so that its log has everything of a run."""


@dataclass(frozen=True, slots=True)
class NodeReply:
    """A reply with content and a weight."""

    node: int
    content: RecordDict
    metrics: MetricRecord
    weight: float
    """What it counts; only ratios matter."""


def usable_replies(
    replies: Iterable[Message], weighted_by_key: str, asked: Sequence[int], step: str
) -> list[NodeReply]:
    """One reply a node, in the order of the nodes' ids: the order of arrival changes no bit.

    Errors, replies without one positive weight, second replies, and nodes that did not answer are
    left out by name.

    Args:
        replies: as Flower's grid hands them over.
        weighted_by_key: the weight's key in the metrics.
        asked: the nodes that got a message.
        step: what the log calls the step.
    """
    found: dict[int, NodeReply] = {}
    heard = set()
    for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
        node = message.metadata.src_node_id
        heard.add(node)
        if node in found:
            leave_out(step, node, ["it replied twice; the first reply counts"])
            continue
        try:
            found[node] = _opened(message, node, weighted_by_key)
        except ValueError as error:
            leave_out(step, node, [str(error)])
    for node in asked:
        if node not in heard:
            leave_out(step, node, ["it did not answer"])
    return list(found.values())


def leave_out(step: str, node: int, faults: Sequence[str]) -> None:
    """Say which node takes no part, and why: what it sent itself is escaped, cut and counted."""
    logger.warning("%s: node %d is left out:", step, node)
    for fault in few(faults):
        logger.warning("\t> %s", outside(fault))


def with_like_metrics(replies: Sequence[NodeReply], step: str) -> list[RecordDict]:
    """The contents whose metrics have the keys, and lists of the lengths, that most have.

    Flower's means of metrics are defined for those only. Nodes with others are named; that touches
    metrics alone, never the model.
    """
    layouts = {reply.node: _layout(reply.metrics) for reply in replies}
    usual = Counter(layouts.values()).most_common(1)[0][0]
    for node, layout in layouts.items():
        if layout != usual:
            odd = sorted(key for key, _ in set(layout) ^ set(usual))
            fault = f"metrics {short(odd)} are not those of most"
            leave_out(f"{step} (metrics only)", node, [fault])
    return [reply.content for reply in replies if layouts[reply.node] == usual]


def _opened(message: Message, node: int, weighted_by_key: str) -> NodeReply:
    if message.has_error():
        raise ValueError(f"error {message.error.code}: {outside(str(message.error.reason))}")
    records = list(message.content.metric_records.values())
    if len(records) != 1:
        raise ValueError(f"expected one MetricRecord, found {len(records)}")
    _check_metrics(records[0])
    weight = records[0].get(weighted_by_key)
    if not isinstance(weight, int | float) or not isfinite(weight) or weight <= 0:
        raise ValueError(
            f"metric {weighted_by_key!r}: expected a positive number, found {short(weight)}"
        )
    return NodeReply(node, message.content, records[0], float(weight))


def _check_metrics(metrics: MetricRecord) -> None:
    """Refuse metrics that Flower's log could not show.

    Raises:
        ValueError: saying how many there are, and the first.
    """
    if len(metrics) > _METRICS:
        raise ValueError(f"{len(metrics)} metrics, expected at most {_METRICS}")
    odd = [
        key
        for key, value in metrics.items()
        if len(key) > _NAME
        or not (key.isascii() and key.isprintable())
        or (isinstance(value, list) and len(value) > _VALUES)
    ]
    if odd:
        raise ValueError(
            f"{len(odd)} metric(s) with a name of more than {_NAME} plain characters, or with more "
            f"than {_VALUES} numbers, as {short(odd[0])}"
        )


def _layout(metrics: MetricRecord) -> tuple[tuple[str, int | None], ...]:
    """Keys in order, with the length of what is a list."""
    return tuple(
        (key, len(value) if isinstance(value, list) else None)
        for key, value in sorted(metrics.items())
    )
