"""FedAvgM on the exact update: momentum on the server, in factors.

Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, arXiv:1909.06335, put momentum on the mean of the clients' changes. Others
keep one for A and one for B, which means nothing once the factors are turned or split anew. Here it
is that of the product: with ``(B_t, A_t)`` the adapter that clients start from,

    D_t = sum_i p_i B_i A_i - B_t A_t         the mean change of the round, exact
    V_t = momentum V_(t-1) + D_t
    E_t+1 = E_t + rate V_t                    E_t: adapter and all remainders so far

The next adapter is the mean one, and everything else goes to the frozen weight: the round is the
ideal plus ``rate V_t - D_t``, and is held to that. V is kept in factors at a bounded rank; what
that leaves out is stated in the record. With momentum 0 and rate 1 it is FedEx-LoRA, bit for bit.
"""

from __future__ import annotations

from pydantic import Field

from fedexlora.algebra import assignment
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods.method import Method, Options
from fedexlora.methods.momentum import kept, mean_change, plus, remembered
from fedexlora.methods.rule import Memory, ModuleRound, ModuleStep, Rule


class FedAvgMOptions(Options):
    """Of the server's momentum."""

    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """What of the last round's momentum stays."""
    rate: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """The server's learning rate: what the momentum is multiplied by when it is applied."""
    momentum_rank: int | None = Field(default=None, ge=1)
    """How many directions of a module's momentum are kept; four times the adapter's rank if not
    given."""


def _server(options: FedAvgMOptions, module: ModuleRound) -> ModuleStep:
    moments = module.moments
    adapter = assignment.mean(moments, module.holder)
    remainder = assignment.remainder(moments, adapter)
    own = {client: assignment.mean(moments, x) for client, x in module.owners.items()}
    if options.momentum == 0.0 and options.rate == 1.0:
        return ModuleStep(adapter, remainder, own)
    change = mean_change(module)
    momentum = plus(remembered(module.memory, change).scaled(options.momentum), change)
    added = plus(momentum.scaled(options.rate), change.scaled(-1.0))
    memory, lacks = _kept(options, momentum, module.holder.rank)
    return ModuleStep(
        adapter,
        plus(remainder, added),
        own,
        added=added,
        memory=memory,
        memory_error=lacks,
    )


def _kept(options: FedAvgMOptions, momentum: LowRank, rank: int) -> tuple[Memory, float]:
    """What of the momentum is remembered, and the norm of the rest; nothing if it never counts."""
    if options.momentum == 0.0:
        return {}, 0.0
    return kept(momentum, rank, options.momentum_rank)


def _rule(options: FedAvgMOptions) -> Rule:
    plain = options.momentum == 0.0 and options.rate == 1.0
    return Rule(
        lambda module: _server(options, module),
        exact=plain,
        certified=True,
        remembers=options.momentum > 0.0,
        mixed_ranks=True,
    )


FEDAVGM = Method(
    name="fedavgm",
    title="FedAvgM on the exact update",
    paper="arXiv:1909.06335 (2019), in factors",
    sends="up A and B; down mean A, mean B, and residual and momentum in factors",
    keeps="residual and momentum, exactly, in the frozen weight",
    certified_against="the ideal plus the momentum that it adds",
    stored="none",
    rule=_rule,
    options=FedAvgMOptions,
)
