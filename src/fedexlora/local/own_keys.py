"""The keys of ``[training]`` that are ours; all others are fields of ``TrainingArguments``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """Our part of the table."""

    schedule: Literal["round", "run"] = "round"
    """Whether every round has a learning-rate schedule of its own, or one goes over all rounds."""
    device: str = "auto"
    """Where the model is trained and scored: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps``."""


DEVICE_NAMES = "auto, cpu, cuda, cuda:N or mps"
OWN_KEYS = tuple(field.name for field in fields(OwnKeys))


def with_own_keys(training: Mapping[str, Any]) -> dict[str, Any]:
    """The table with a value for each of our keys."""
    return {**asdict(OwnKeys()), **training}


def library_options(training: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``TrainingArguments`` alone."""
    return {key: value for key, value in training.items() if key not in OWN_KEYS}


def is_device_name(name: str) -> bool:
    """Whether a device may be named so, on whatever machine it is looked for.

    >>> [is_device_name(name) for name in ("auto", "cuda:1", "gpu", "cuda:")]
    [True, True, False, False]
    """
    return re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", name) is not None


def stated_device(training: Mapping[str, Any]) -> str:
    """The device that the table states: ``use_cpu`` is transformers' way to say ``cpu``."""
    if training.get("use_cpu"):
        return "cpu"
    return str(training.get("device", OwnKeys().device))
