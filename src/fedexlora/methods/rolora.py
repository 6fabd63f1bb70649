"""RoLoRA: train and average the halves in turn, B first.

Chen, Guo, Ju, Dalal, Zhu and Khisti, "Robust Federated Finetuning of LLMs via Alternating
Optimization of LoRA", NeurIPS 2025, arXiv:2502.01755. In rounds 1, 3, 5, ... clients train and send
B while A, which all share, is frozen; in the others the other way round. The frozen half is common,
so the mean of the products is the product of the means: nothing is left over. With A first the
first round would be lost, as A gets no gradient while B is zero.
"""

from __future__ import annotations

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import Rule


def _rule(options: Options) -> Rule:
    del options
    server = next_adapter(assignment.mean, assignment.drop)
    return Rule(server, exact=True, certified=True, halves=(("B",), ("A",)))


ROLORA = Method(
    name="rolora",
    title="RoLoRA",
    paper="arXiv:2502.01755 (NeurIPS 2025)",
    sends="up B in odd rounds and A in even ones; down its mean",
    keeps="nothing is left over: the other half is frozen and shared",
    certified_against="the ideal",
    stored="none",
    rule=_rule,
)
