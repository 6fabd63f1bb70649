"""FLoRA: stack the clients' factors, and give all of their mean update to the frozen weight.

Wang, Shen, He, Sun, Wang, Lyu and Li, "FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations", NeurIPS 2024, arXiv:2409.05976, and the authors' code. Every
client starts a round from an A of its own, drawn anew, and ``B = 0``. The server stacks,

    B = [B_1, ..., B_K],    A = [p_1 A_1; ...; p_K A_K],    B A = sum_i p_i B_i A_i,

which is the ideal, and the weight takes all of it. The common adapter is drawn anew too, with a
product of zero; no client trains it. Any ranks fit. The paper merges one scaling for all; here
every client's own is in its B before it is stacked, so that scalings may differ.

Other copies: a stack of a fixed rank that loads only if all clients take part; the scaling left
out; one A for all clients and rounds; no ``p_i``.
"""

from __future__ import annotations

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import ClientRound, ClientRule, Rule, Trainables


def start_anew(at: ClientRound) -> Trainables:
    """New factors that only this client has, and the heads that it received."""
    return Trainables(at.fresh(), at.received.heads)


def _rule(options: Options) -> Rule:
    del options
    return Rule(
        next_adapter(assignment.fresh, assignment.keep),
        exact=True,
        certified=True,
        client=ClientRule(enter=start_anew),
        mixed_ranks=True,
        makes_up=False,
        fresh_start=True,
        draws=True,
    )


FLORA = Method(
    name="flora",
    title="FLoRA",
    paper="arXiv:2409.05976 (NeurIPS 2024)",
    sends="up A and B; down the mean update in factors, and new factors",
    keeps="the whole mean update, exactly, in the frozen weight",
    certified_against="the ideal",
    stored="products",
    rule=_rule,
)
