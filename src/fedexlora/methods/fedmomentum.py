"""FedMomentum: the best adapter of the mean update, and the rest of it to the frozen weight.

Yan, Hua, Wang, Zhang, Wu, Song and Guan, "FedMomentum: Preserving LoRA Training Momentum in
Federated Fine-Tuning", 2026, arXiv:2603.08014; split and threshold are read from the public copy in
FedLLM-Factory, as the authors' code is not public. With

    sum_i p_i B_i A_i = U S V^T,    k = min{k : sum_(j<=k) s_j^2 >= energy sum_j s_j^2},

clients continue from ``B = U_r sqrt(S_r)``, ``A = sqrt(S_r) V_r^T``, directions r + 1 to k go to
the frozen weight, and the rest is left out, by how much is stated. With ``energy = 1`` the round is
exact, and is FedEx-LoRA with ``next_adapter = "svd"``. There is no buffer of a momentum: what is
carried on is the adapter. The adapter keeps its rank where k is lower. Clients of other ranks get
the best adapter of their own, and hold what it lacks of the common one beside the weight; the paper
has one rank.

Other copies: the scaling left out of what goes to the weight; an adapter that shrinks to k and then
cannot be loaded.
"""

from __future__ import annotations

from pydantic import Field

from fedexlora.algebra import assignment
from fedexlora.algebra.assignment import RemainderRule
from fedexlora.methods.method import Method, Options
from fedexlora.methods.rule import ModuleRound, ModuleStep, Rule, Truncation


class FedMomentumOptions(Options):
    """How much of an update is kept."""

    energy: float = Field(default=0.9999, gt=0.0, le=1.0)
    """The share of every module's update that adapter and weight keep, by its squared norm; 1 keeps
    all."""


def _remainder_rule(energy: float, update: float, rest: float) -> RemainderRule:
    """What is kept of a remainder, so that a share of the whole update is.

    Args:
        energy: the share.
        update: the squared norm of the update.
        rest: that of what the adapter lacks of it.
    """
    lost = (1.0 - energy) * update
    return assignment.drop if rest <= lost else assignment.truncate_to_energy(1.0 - lost / rest)


def _server(options: FedMomentumOptions, module: ModuleRound) -> ModuleStep:
    moments = module.moments
    adapter = assignment.best(moments, module.holder)
    own = {client: assignment.best(moments, holder) for client, holder in module.owners.items()}
    whole = assignment.remainder(moments, adapter)
    if options.energy == 1.0:
        return ModuleStep(adapter, whole, own)
    update = assignment.ideal(moments).squared_norm()
    kept, lacks = _remainder_rule(options.energy, update, whole.squared_norm())(whole)
    return ModuleStep(adapter, kept, own, Truncation(whole, kept, lacks))


def _rule(options: FedMomentumOptions) -> Rule:
    return Rule(
        lambda module: _server(options, module),
        exact=options.energy == 1.0,
        certified=True,
        mixed_ranks=True,
        draws=True,
    )


FEDMOMENTUM = Method(
    name="fedmomentum",
    title="FedMomentum",
    paper="arXiv:2603.08014 (2026)",
    sends="up A and B; down the best factors and the kept rest in factors",
    keeps="the directions beyond the rank, up to the energy, in the frozen weight",
    certified_against="the ideal less what is cut off, which is stated",
    stored="none",
    rule=_rule,
    options=FedMomentumOptions,
)
