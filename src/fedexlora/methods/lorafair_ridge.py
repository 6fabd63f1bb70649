"""LoRA-FAIR in a closed form: the mean A, and the B that comes nearest to the ideal with it.

Bian, Wang, Zhang and Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", ICCV 2025, arXiv:2411.14961, hand out the mean A and a B that is the mean one and a
correction, so that ``(B + dB) A`` is like the ideal ``M``; the frozen weight stays as it is, and
traffic is that of FedIT. The paper's likeness is a cosine, which leaves the length of the update
free, and its correction is found by steps of SGD from a start that nothing seen of it settles. This
is a variant of ours, without either:

    dB = argmin |M - (B + dB) A|^2 + ridge |dB|^2 = (M - B A) A^T (A A^T + ridge I)^-1

in the squared Frobenius norm, with ``A`` and ``B`` the weighted means. ``M - B A`` is the residual,
so the correction is computed from factors. What of the residual lies outside the rows of A is lost.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods.method import Method, Options
from fedexlora.methods.rule import ModuleRound, ModuleStep, Rule


class LoRAFairRidgeOptions(Options):
    """How far B may move."""

    ridge: float = Field(default=0.01, gt=0.0, allow_inf_nan=False)
    """What the squared norm of the correction of B counts beside the squared error of the
    update."""


def correction(residual: LowRank, mean: Factors, ridge: float) -> Tensor:
    """``R A^T (A A^T + ridge I)^-1``, ``(M, r)``, float64.

    Args:
        residual: ``R (M, N)``: what the product of the mean factors lacks.
        mean: the mean factors.
        ridge: positive.
    """
    a = mean.A.to(torch.float64)
    if isinstance(residual.value, Factors):
        wide = residual.value.to(torch.float64)
        along = wide.B @ (wide.A @ a.T)
    else:
        along = residual.value.to(torch.float64) @ a.T
    gram = a @ a.T + ridge * torch.eye(len(a), dtype=torch.float64, device=a.device)
    found: Tensor = torch.linalg.solve(gram, along.T).T
    return found


def _server(options: LoRAFairRidgeOptions, module: ModuleRound) -> ModuleStep:
    mean, residual = module.moments.mean, module.moments.residual()
    adapter = Factors(mean.A, mean.B + correction(residual, mean, options.ridge))
    return ModuleStep(adapter, LowRank.zeros(*mean.shape, torch.float64))


def _rule(options: LoRAFairRidgeOptions) -> Rule:
    return Rule(lambda module: _server(options, module), exact=False, certified=False)


LORAFAIR_RIDGE = Method(
    name="lorafair_ridge",
    title="LoRA-FAIR, closed ridge form",
    paper="arXiv:2411.14961 (ICCV 2025)",
    sends="up A and B; down mean A and a corrected mean B",
    keeps="nothing: the residual outside the rows of the mean A is lost",
    certified_against="nothing: its error is measured",
    stored="none",
    rule=_rule,
    options=LoRAFairRidgeOptions,
)
