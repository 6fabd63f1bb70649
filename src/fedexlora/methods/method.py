"""What a method is: where it is published, its options, and the rule that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from fedexlora.methods.rule import Rule

Stored = Literal["products", "factors", "none"]
"""What a method makes of adapters that are stored: the mean of their products, the product of their
mean factors, or nothing, because it needs more than finished adapters."""


class Options(BaseModel):
    """The options of a method in a recipe's ``[method]``; by default it has none."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True)
class Method:
    """One published way to aggregate LoRA adapters."""

    name: str
    title: str
    paper: str
    """Where it is published."""
    sends: str
    """What a client uploads and downloads, for people."""
    keeps: str
    """What becomes of the difference to the ideal, for people."""
    certified_against: str
    """What every round is held to, for people."""
    stored: Stored
    """What ``aggregate`` makes of stored adapters; no method has a default."""
    rule: Callable[[Any], Rule]
    """What a run does, given the method's options."""
    options: type[Options] = Options

    @property
    def default(self) -> Rule:
        """The rule where no option is given."""
        return self.rule(self.options())

    def rule_of(self, options: Mapping[str, Any]) -> Rule:
        """The rule of options by name.

        Raises:
            ValidationError: if there is no such option, or a value is wrong.
        """
        return self.rule(self.options.model_validate(dict(options)))
