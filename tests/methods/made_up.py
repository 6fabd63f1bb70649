"""A method of nobody: the ideal goes to the weight, and clients continue from last round's mean."""

from __future__ import annotations

from pydantic import Field

from fedexlora.algebra import assignment
from fedexlora.algebra.factors import Factors
from fedexlora.methods.method import Method, Options
from fedexlora.methods.rule import ModuleRound, ModuleStep, Rule


class MadeUpOptions(Options):
    """How clients continue."""

    shrink: float = Field(default=0.5, gt=0.0, le=1.0)
    """What B is multiplied by before clients continue from it."""


def _rule(options: MadeUpOptions) -> Rule:
    def server(module: ModuleRound) -> ModuleStep:
        mean = module.moments.mean
        before = Factors(module.memory["A"], module.memory["B"]) if module.memory else mean
        adapter = before.to(mean.dtype).scaled(options.shrink)
        remainder = assignment.remainder(module.moments, adapter)
        return ModuleStep(adapter, remainder, memory={"A": mean.A, "B": mean.B})

    return Rule(server, exact=True, certified=True, remembers=True)


MADE_UP = Method(
    name="made_up",
    title="Made-up LoRA",
    paper="tests/methods/made_up.py",
    sends="up A and B; down last round's mean and what it lacks",
    keeps="all of it",
    certified_against="the ideal",
    stored="none",
    rule=_rule,
    options=MadeUpOptions,
)
