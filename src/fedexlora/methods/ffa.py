"""FFA-LoRA: freeze A, which all clients share, and average B.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
arXiv:2403.12313. With one A for all, the residual is zero and averaging B is exact; the price is
half of the trainable parameters.
"""

from __future__ import annotations

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import Rule


def _rule(options: Options) -> Rule:
    del options
    server = next_adapter(assignment.mean, assignment.drop)
    return Rule(server, exact=True, certified=True, halves=(("B",),))


FFA = Method(
    name="ffa",
    title="FFA-LoRA",
    paper="arXiv:2403.12313 (ICLR 2024)",
    sends="up B; down mean B",
    keeps="nothing is left over: A is frozen and shared",
    certified_against="the ideal",
    stored="factors",
    rule=_rule,
)
