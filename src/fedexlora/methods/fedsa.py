"""FedSA-LoRA: share and average A; B stays with its client.

Guo, Zeng, Wang, Fan, Wang and Qu, "Selective Aggregation for Low-Rank Adaptation in Federated
Learning", ICLR 2025, arXiv:2410.01463. Clients train both factors and send A; each continues from
the mean A and the B that it trained itself, so that there is one model a client and no global one.
In the authors' recipes for classification the head stays with its client too. A client that comes
for the first time, or has lost its memory, starts with the B of version 0.
"""

from __future__ import annotations

from typing import Literal

from fedexlora.algebra import assignment
from fedexlora.algebra.factors import Factors
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import ClientRound, ClientRule, Memory, Rule, Trainables


class FedSAOptions(Options):
    """What stays with clients beside B."""

    heads: Literal["local", "averaged"] = "local"
    """Whether heads and biases stay with their clients, or are averaged."""


def _enter(at: ClientRound) -> Trainables:
    """The mean A and the client's own B; its own heads, where those are local."""
    memory, received = at.memory, at.received
    factors = {
        name: Factors(pair.A, memory.get(f"B/{name}", pair.B))
        for name, pair in received.factors.items()
    }
    heads = {name: memory.get(f"dense/{name}", head) for name, head in received.heads.items()}
    return Trainables(factors, heads)


def _client(options: FedSAOptions) -> ClientRule:
    def leave(at: ClientRound, trained: Trainables) -> tuple[Trainables, Memory]:
        del at
        memory = {f"B/{name}": pair.B for name, pair in trained.factors.items()}
        if options.heads == "local":
            memory |= {f"dense/{name}": head for name, head in trained.heads.items()}
        return trained, memory

    return ClientRule(_enter, leave, memory="optional")


def _rule(options: FedSAOptions) -> Rule:
    return Rule(
        next_adapter(assignment.mean, assignment.drop),
        exact=False,
        certified=False,
        local=("B",),
        local_heads=options.heads == "local",
        client=_client(options),
        personal=True,
    )


FEDSA = Method(
    name="fedsa",
    title="FedSA-LoRA",
    paper="arXiv:2410.01463 (ICLR 2025)",
    sends="up A; down mean A",
    keeps="every client's B, on its own disk: there is one model a client",
    certified_against="nothing: no model is that of all clients",
    stored="none",
    rule=_rule,
    options=FedSAOptions,
)
