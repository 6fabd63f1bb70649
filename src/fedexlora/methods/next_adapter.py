"""The server's rule of the methods that choose a next adapter and what becomes of the remainder."""

from __future__ import annotations

from collections.abc import Callable

from fedexlora.algebra import assignment
from fedexlora.algebra.assignment import Assignment, RemainderRule
from fedexlora.methods.rule import ModuleRound, ModuleStep, Truncation


def next_adapter(
    choice: Assignment, rule: RemainderRule, *, states_loss: bool = False
) -> Callable[[ModuleRound], ModuleStep]:
    """A next adapter ``(A', B')``, and the remainder ``M - B' A'`` of the ideal beside the weight.

    Args:
        choice: of the next adapter.
        rule: what of the remainder is kept.
        states_loss: whether what is not kept is stated, and the step held to it.
    """

    def server(module: ModuleRound) -> ModuleStep:
        moments = module.moments
        adapter = choice(moments, module.holder)
        whole = assignment.remainder(moments, adapter)
        kept, lacks = rule(whole)
        return ModuleStep(
            adapter,
            kept,
            own={client: choice(moments, holder) for client, holder in module.owners.items()},
            truncation=Truncation(whole, kept, lacks) if states_loss else None,
        )

    return server
