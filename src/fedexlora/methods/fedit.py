"""FedIT: average the factors; the residual is lost.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
arXiv:2305.05644. The mean of products is replaced by the product of means, which is inexact.
"""

from __future__ import annotations

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import Rule


def _rule(options: Options) -> Rule:
    del options
    return Rule(next_adapter(assignment.mean, assignment.drop), exact=False, certified=False)


FEDIT = Method(
    name="fedit",
    title="FedIT",
    paper="arXiv:2305.05644 (ICASSP 2024)",
    sends="up A and B; down mean A and mean B",
    keeps="nothing: the residual is lost",
    certified_against="nothing: its error is measured",
    stored="factors",
    rule=_rule,
)
