"""FedSVD: train B under a frozen A, and take a better A from the mean product.

Lee, Park, Lee, Wagner, Seong, Bocklet, Lee and Hwang, "FedSVD: Adaptive Orthogonalization for
Private Federated Learning with LoRA", NeurIPS 2025, arXiv:2505.12805, and the authors' code. All
clients share A and send B. With ``B = sum_i p_i B_i`` the product ``B A`` is the ideal, and the
server factors it anew,

    B A = U S V^T,    B <- U_r S_r,    A <- V_r^T,

after every round, or after every ``period`` rounds. The rank of ``B A`` is at most r, so nothing is
lost; A has orthonormal rows from then on. The first round runs on the random A. Where B is zero,
there is nothing to take A from, and it stays. The authors freeze the classifier; here heads are
averaged as in every method.

Other copies: none was found.
"""

from __future__ import annotations

import torch
from pydantic import Field

from fedexlora.algebra import assignment
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.algebra.product import svd
from fedexlora.methods.method import Method, Options
from fedexlora.methods.rule import ModuleRound, ModuleStep, Rule


class FedSVDOptions(Options):
    """When A changes."""

    period: int = Field(default=1, ge=1)
    """The product is factored anew after every this many rounds."""


def refactored(pair: Factors) -> Factors:
    """The same product, with orthonormal rows of A.

    A rank above M or N leaves rows of A over, which stay, with columns of zeros in B.

    Args:
        pair: ``A (R, N)`` and ``B (M, R)``.
    """
    if not bool(pair.B.any()):
        return pair
    u, s, vh = svd(pair)
    rest = Factors(pair.A[len(s) :], torch.zeros_like(pair.B[:, len(s) :]))
    return stack([Factors(vh, u * s), rest])


def _server(options: FedSVDOptions, module: ModuleRound) -> ModuleStep:
    moments = module.moments
    adapter = assignment.mean(moments, module.holder)
    if module.round % options.period == 0:
        adapter = refactored(adapter)
    return ModuleStep(adapter, LowRank.zeros(*adapter.shape, torch.float64))


def _rule(options: FedSVDOptions) -> Rule:
    return Rule(
        lambda module: _server(options, module),
        exact=True,
        certified=True,
        halves=(("B",),),
        changes=("A", "B"),
    )


FEDSVD = Method(
    name="fedsvd",
    title="FedSVD",
    paper="arXiv:2505.12805 (NeurIPS 2025)",
    sends="up B; down A and B",
    keeps="nothing is left over: A is frozen while clients train, and shared",
    certified_against="the ideal",
    stored="none",
    rule=_rule,
    options=FedSVDOptions,
)
