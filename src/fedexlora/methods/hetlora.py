"""HetLoRA: average padded factors by the norms of the clients' products, and truncate them.

Cho, Liu, Xu, Fahrezi and Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device
Foundation Models", EMNLP 2024, arXiv:2401.06432, Fig. 2. There is no public code of the authors.
Factors of lower ranks are padded with zeros, and

    q_i = |B_i A_i| / sum_j |B_j A_j|,    A = sum_i q_i A_i,    B = sum_i q_i B_i,

so that numbers of rows do not count; a client gets the first r_i rows of A and columns of B. With
equal ranks and norms it is FedIT with equal weights. Open in what could be read of the paper, and
chosen here: the norms are those of each module by itself, and of products in one common scaling,
s_i B_i A_i; where all are zero, the weights are those of the rows.

Left out is self-pruning, by which a client lowers its own rank: it needs a penalty in the local
loss, whose weight is not published, and ranks that change within a run.

Other copies: weights by rows; a penalty on values without gradient; mere padding under this name.
"""

from __future__ import annotations

from math import sqrt

import torch

from fedexlora.algebra.factors import Factors, squared_norm
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods.method import Method, Options
from fedexlora.methods.rule import ModuleRound, ModuleStep, Rule


def norm_weights(module: ModuleRound) -> list[float]:
    """``q_i`` of every client; they add up to one."""
    norms = [sqrt(squared_norm(pair)) for pair, _ in module.clients()]
    found = norms if any(norms) else [weight for _, weight in module.clients()]
    whole = sum(found)
    return [value / whole for value in found]


def _server(module: ModuleRound) -> ModuleStep:
    common = module.holder.previous.to(torch.float64)
    a, b = torch.zeros_like(common.A), torch.zeros_like(common.B)
    for q, (pair, _) in zip(norm_weights(module), module.clients(), strict=True):
        a += q * pair.A.double()
        b += q * pair.B.double()
    adapter = Factors(a, b)
    own = {client: adapter.first(holder.rank) for client, holder in module.owners.items()}
    return ModuleStep(adapter, LowRank.zeros(*adapter.shape, adapter.dtype), own)


def _rule(options: Options) -> Rule:
    del options
    return Rule(
        _server,
        exact=False,
        certified=False,
        mixed_ranks=True,
        makes_up=False,
        truncates=True,
        weighs_clients=True,
    )


HETLORA = Method(
    name="hetlora",
    title="HetLoRA without self-pruning",
    paper="arXiv:2401.06432 (EMNLP 2024)",
    sends="up A and B; down the first rows of A and columns of B",
    keeps="nothing: the residual is lost",
    certified_against="nothing: its error is measured",
    stored="none",
    rule=_rule,
)
