"""FedAdam on the exact update, with a factored second moment: a variant, and named so.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295, Algorithm 2, divide a
momentum of the clients' mean change by the root of its second moment, entry by entry and without
bias correction. Others do that to A and to B, whose means are not the mean change, and which mean
nothing once they are turned or split anew; OpenFedLLM squares the momentum in place of the change.
Of the change itself, the quotient of every entry is a dense matrix. Shazeer and Stern, "Adafactor",
2018, arXiv:1804.04235, Sec. 3, keep of the second moment the means of its rows and columns alone:

    D_t   = s (sum_i p_i B_i A_i - B_t A_t)       the mean change of the round, exact, as applied
    m_t   = beta1 m_(t-1) + (1 - beta1) D_t
    u_t   = beta2 u_(t-1) + (1 - beta2) mean_j D_ij^2         of a row i,    u_0 = 0
    c_t   = beta2 c_(t-1) + (1 - beta2) mean_i D_ij^2         of a column j, c_0 = 0
    V_ij  = (u_i + tau^2) (c_j + tau^2) / mean_i (u_i + tau^2)
    E_t+1 = E_t + rate m_t / sqrt(V)              E_t: adapter and all remainders so far

The quotient scales rows and columns of m, so that it has the rank of m, and all of it is computed
from factors. ``tau^2`` stands in the means, as Adafactor's epsilon does, because a tau beside the
root would undo that; it is as if v began at ``tau^2``, the least that the paper allows.

The next adapter is the mean one, and everything else goes to the frozen weight: the round is the
ideal plus ``rate m_t / sqrt(V) - D_t``, and is held to that. m is kept in factors at a bounded
rank; what that leaves out is stated in the record. beta1, beta2 and tau are those of Flower's
FedAdam; the rate is not, because the changes of an adapter are smaller than those of weights.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fedexlora.algebra import assignment
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods.method import Method, Options
from fedexlora.methods.momentum import kept, mean_change, plus, remembered
from fedexlora.methods.rule import Memory, ModuleRound, ModuleStep, Rule

_PARTS = ("rows", "columns")
"""Of the server's memory: the second moment."""


class FedAdamOptions(Options):
    """Of the server's optimizer."""

    rate: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    """The server's learning rate: about the largest change of an entry of a weight in a round."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """What of the last round's momentum stays."""
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)
    """What of the last round's second moment stays."""
    tau: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    """How adaptive it is: changes of a weight that are much smaller are multiplied by rate / tau,
    all alike."""
    momentum_rank: int | None = Field(default=None, ge=1)
    """How many directions of a module's momentum are kept; four times the adapter's rank if not
    given."""


def _server(options: FedAdamOptions, module: ModuleRound) -> ModuleStep:
    moments = module.moments
    adapter = assignment.mean(moments, module.holder)
    change = mean_change(module)
    before = remembered(module.memory, change).scaled(options.beta1)
    momentum = plus(before, change.scaled(1.0 - options.beta1))
    squares = _second_moments(options, module.memory, change.scaled(module.scaling))
    added = plus(_quotient(options, momentum, *squares), change.scaled(-1.0))
    memory, lacks = _kept(options, momentum, module.holder.rank)
    return ModuleStep(
        adapter,
        plus(assignment.remainder(moments, adapter), added),
        {client: assignment.mean(moments, whom) for client, whom in module.owners.items()},
        added=added,
        memory={**memory, "rows": squares[0], "columns": squares[1]},
        memory_error=lacks,
    )


def _second_moments(
    options: FedAdamOptions, memory: Memory, change: LowRank
) -> tuple[Tensor, Tensor]:
    """``u (M,)`` and ``c (N,)``, float64, after a change."""
    now = mean_squares(change)
    before = [memory.get(part, torch.zeros_like(x)) for part, x in zip(_PARTS, now, strict=True)]
    rows, columns = (
        options.beta2 * then + (1.0 - options.beta2) * x
        for then, x in zip(before, now, strict=True)
    )
    return rows, columns


def mean_squares(matrix: LowRank) -> tuple[Tensor, Tensor]:
    """The means of a matrix's squared entries, of every row ``(M,)`` and column ``(N,)``, float64.

    Of factors, ``mean_j (B A)_ij^2 = (B (A A^T) B^T)_ii / N``: nothing is multiplied out.
    """
    rows, columns = matrix.shape
    if isinstance(matrix.value, Tensor):
        squares = matrix.value.to(torch.float64).square()
        return squares.mean(1), squares.mean(0)
    wide = matrix.value.to(torch.float64)
    of_rows = ((wide.B @ (wide.A @ wide.A.T)) * wide.B).sum(1) / columns
    of_columns = (((wide.B.T @ wide.B) @ wide.A) * wide.A).sum(0) / rows
    return of_rows.clamp(min=0.0), of_columns.clamp(min=0.0)


def _quotient(options: FedAdamOptions, momentum: LowRank, u: Tensor, c: Tensor) -> LowRank:
    """``rate m / sqrt(V)``: of momentum that is unscaled, unscaled."""
    floor = options.tau**2
    rows = options.rate * ((u + floor).mean() / (u + floor)).sqrt()[:, None]
    columns = (c + floor).rsqrt()
    if isinstance(momentum.value, Tensor):
        return LowRank(momentum.value * rows * columns)
    return LowRank(Factors(momentum.value.A * columns, momentum.value.B * rows))


def _kept(options: FedAdamOptions, momentum: LowRank, rank: int) -> tuple[Memory, float]:
    if options.beta1 == 0.0:
        return {}, 0.0
    return kept(momentum, rank, options.momentum_rank)


def _rule(options: FedAdamOptions) -> Rule:
    return Rule(
        lambda module: _server(options, module),
        exact=False,
        certified=True,
        remembers=True,
        mixed_ranks=True,
    )


FEDADAM_FACTORED = Method(
    name="fedadam_factored",
    title="FedAdam on the exact update, factored second moment",
    paper="arXiv:2003.00295 (ICLR 2021)",
    sends="up A and B; down mean A, mean B, and residual and step in factors",
    keeps="residual and the server's step, in the frozen weight",
    certified_against="the ideal plus what the server's step adds to it",
    stored="none",
    rule=_rule,
    options=FedAdamOptions,
)
