"""RBLA: average every row of A and column of B over the clients that have it.

Chen, Tavallaie, Nazemi and Zomaya, "RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous
Models in FLaaS", 2024, arXiv:2408.08699; the rule is read from the code of the authors' group. With
r_i the rank of client i, for every j below the common rank

    A[j, :] = sum_(i: r_i > j) n_i A_i[j, :] / sum_(i: r_i > j) n_i,    B[:, j] likewise.

A client gets the first r_i rows and columns. Factors are averaged apart, so the product is not the
mean product; with equal ranks it is FedIT. A row that nobody in the round has stays as it was,
which the code has no case for. Scalings are not in the rule; here a client's B is brought to the
common scaling before it is averaged and back before it is handed out, so that equal products count
equally.

Other copies: RB-LoRA's correction of the weights is computed and never applied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods.method import Method, Options
from fedexlora.methods.rule import ModuleRound, ModuleStep, Rule


def row_means(module: ModuleRound) -> Factors:
    """The means of rows and columns, float64, ``A (R, N)`` and ``B (M, R)``."""
    previous = module.holder.previous.to(torch.float64)
    a, b = torch.zeros_like(previous.A), torch.zeros_like(previous.B)
    having = a.new_zeros(module.holder.rank)
    for i, (pair, weight) in enumerate(module.clients()):
        rank = module.ranks[i] if module.ranks else module.holder.rank
        a[:rank] += weight * pair.A[:rank].double()
        b[:, :rank] += weight * pair.B[:, :rank].double()
        having[:rank] += weight
    return Factors(_over(a, previous.A, having[:, None]), _over(b, previous.B, having[None]))


def _over(total: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    return torch.where(
        weight > 0.0, total / weight.clamp(min=torch.finfo(weight.dtype).tiny), before
    )


def _server(module: ModuleRound) -> ModuleStep:
    adapter = row_means(module)
    own = {client: adapter.first(holder.rank) for client, holder in module.owners.items()}
    return ModuleStep(adapter, LowRank.zeros(*adapter.shape, torch.float64), own)


def _rule(options: Options) -> Rule:
    del options
    return Rule(
        _server,
        exact=False,
        certified=False,
        mixed_ranks=True,
        makes_up=False,
        truncates=True,
    )


RBLA = Method(
    name="rbla",
    title="RBLA",
    paper="arXiv:2408.08699 (2024)",
    sends="up A and B; down the first rows of A and columns of B",
    keeps="nothing: the residual is lost",
    certified_against="nothing: its error is measured",
    stored="none",
    rule=_rule,
)
