"""The labels that a base model's own head was trained on, beside those of the task."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PretrainedConfig

from fedexlora.data.classification import Classification
from fedexlora.data.task import Task

_UNNAMED = re.compile(r"LABEL_\d+")


def head_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """The labels that a model's configuration names, by class; none if it does not name them."""
    labels = getattr(config, "id2label", None) or {}
    names = tuple(str(labels.get(i)) for i in range(len(labels)))
    return () if all(map(_UNNAMED.fullmatch, names)) else names


def in_head_order(task: Task, head: Sequence[str]) -> Task:
    """The task with its labels in the order of the base's head, if it has the same ones.

    Upper and lower case do not matter; a head of other labels changes nothing.
    """
    if not isinstance(task, Classification):
        return task
    own = {label.casefold(): label for label in task.labels}
    wanted = [label.casefold() for label in head]
    if len(own) != len(task.labels) or sorted(own) != sorted(wanted):
        return task
    return task.ordered([own[label] for label in wanted])


def head_note(before: Task, task: Task, head: Sequence[str], *, trained: bool) -> str | None:
    """What a user should know of the base's head; None if it is new, or is as they would expect.

    Args:
        before: the task before its labels were ordered.
        task: the task that is trained.
        head: the labels that the base names.
        trained: whether the base's files have a head.
    """
    if not isinstance(before, Classification) or not isinstance(task, Classification):
        return None
    names = ", ".join(map(repr, task.labels))
    if task.labels != before.labels:
        return f"labels are in the order of the base model's head: {names}"
    if not trained or [x.casefold() for x in head] == [x.casefold() for x in task.labels]:
        return None
    own = f"the labels {', '.join(map(repr, head))}" if head else "labels without names"
    return f"the base model's head has {own}; its outputs are used, in that order, for {names}"
