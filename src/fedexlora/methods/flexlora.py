"""FlexLoRA: average the products, and hand out their best approximation at every client's rank.

Bai, Chen, Qian, Yao and Li, "Federated Fine-tuning of Large Language Models under Heterogeneous
Tasks and Client Resources", NeurIPS 2024, arXiv:2402.11505, and the authors' code. With

    sum_i p_i s_i B_i A_i = U S V^T,

a client of rank r and scaling s continues from ``B = U_r S_r / s`` and ``A = V_r^T``: all of the
singular values are in B. The frozen weight never changes, so the directions beyond r are lost; for
the common adapter how much is stated. A client of another rank starts from its own approximation
alone, and not from the common model, as in the paper. Where an update has fewer directions than
the rank, new rows of A with columns of zeros fill it up, which the paper leaves to the library.

Other copies: only the square root of S in B and none in A; one dict for all clients, so that all
get the last one's rank; no ``s``.
"""

from __future__ import annotations

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import Rule


def _rule(options: Options) -> Rule:
    del options
    return Rule(
        next_adapter(assignment.best_orthonormal, assignment.drop, states_loss=True),
        exact=False,
        certified=True,
        mixed_ranks=True,
        makes_up=False,
        draws=True,
    )


FLEXLORA = Method(
    name="flexlora",
    title="FlexLoRA",
    paper="arXiv:2402.11505 (NeurIPS 2024)",
    sends="up A and B; down the best factors at the client's rank",
    keeps="nothing beside the adapter: directions beyond its rank are lost",
    certified_against="the ideal less the directions beyond the rank, which are stated",
    stored="none",
    rule=_rule,
)
