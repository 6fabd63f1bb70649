"""Local training alone: every client continues from what it trained itself; nothing is shared.

No method but a reference: what a client reaches without the others. All start from version 0 and
keep factors, heads and biases as memory of their own, so that there is one model a client and no
global one, which stays version 0. A client that has lost its memory starts from version 0 again.
"""

from __future__ import annotations

import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.layout import adapter_tensors, dense_tensors
from fedexlora.methods.method import Method, Options
from fedexlora.methods.rule import (
    ClientRound,
    ClientRule,
    Memory,
    ModuleRound,
    ModuleStep,
    Rule,
    Trainables,
)


def _enter(at: ClientRound) -> Trainables:
    """What the client trained last; version 0 in its first round."""
    if not at.memory:
        return at.received
    memory, names = at.memory, at.received.factors
    factors = {name: Factors(memory[f"A/{name}"], memory[f"B/{name}"]) for name in names}
    heads = {name: memory[f"dense/{name}"] for name in at.received.heads}
    return Trainables(factors, heads)


def _leave(at: ClientRound, trained: Trainables) -> tuple[Trainables, Memory]:
    del at
    return trained, adapter_tensors(trained.factors) | dense_tensors(trained.heads)


def _server(module: ModuleRound) -> ModuleStep:
    previous = module.holder.previous
    return ModuleStep(previous, LowRank.zeros(*previous.shape, torch.float64))


def _rule(options: Options) -> Rule:
    del options
    return Rule(
        _server,
        exact=False,
        certified=False,
        local=("A", "B"),
        local_heads=True,
        client=ClientRule(_enter, _leave, memory="optional"),
        personal=True,
    )


LOCAL_ONLY = Method(
    name="local_only",
    title="local training alone (reference)",
    paper="none (reference)",
    sends="nothing but that it has trained, and its loss",
    keeps="every client's adapter and heads, on its own disk: there is one model a client",
    certified_against="nothing: no model is that of all clients",
    stored="none",
    rule=_rule,
)
