"""A score with its origin, or the reason why it was not computed; and what is missing for it.

A score that cannot be computed is never replaced by another one under its name.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

_MATH = "pip install 'fedexlora[math]'"
INSTALL = {
    "sacrebleu": "pip install 'fedexlora[generation]'",
    "math-verify": _MATH,
    "latex2sympy2_extended": _MATH,
    "antlr4-python3-runtime": _MATH,
    "pycocoevalcap": "pip install 'fedexlora[java-metrics]'",
    "java": "install a Java runtime of version 8 or later, on Debian default-jre-headless",
}


class UncomputedError(Exception):
    """A metric's program failed; its score becomes "not computed" with this reason."""


@dataclass(frozen=True, slots=True)
class Score:
    """One metric's value, with what computed it.

    Attributes:
        name: the metric.
        value: the score, or None if it was not computed.
        reason: why it was not computed; None if it was.
        implementation: the program, and the settings that the value depends on.
        version: the version of each package that took part; empty if one is missing.
    """

    name: str
    value: float | None
    reason: str | None
    implementation: str
    version: str

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(f"{self.name}: either a value or a reason")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.name}: {self.value} is not finite")


def missing(requirements: Sequence[str]) -> list[str]:
    """What of the requirements is not there, each with the way to get it.

    Args:
        requirements: distributions such as ``sacrebleu``, or ``java``.
    """
    return [f"{name} is missing: {INSTALL[name]}" for name in requirements if not _version(name)]


def versions(requirements: Sequence[str]) -> str:
    """The versions of the requirements, as in ``sacrebleu 2.6.0``; empty if one is missing."""
    found = [(name, _version(name)) for name in requirements]
    if not all(version for _, version in found):
        return ""
    return ", ".join(f"{name} {version}" for name, version in found)


def _version(requirement: str) -> str | None:
    if requirement == "java":
        return _java()
    try:
        return metadata.version(requirement)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _java() -> str | None:
    """The version that a Java runtime on PATH states; None if there is none that starts."""
    try:
        done = subprocess.run(
            ["java", "-version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    quoted = done.stderr.split('"')
    return quoted[1] if done.returncode == 0 and len(quoted) > 2 else None
