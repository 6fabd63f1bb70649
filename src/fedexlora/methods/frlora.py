"""FR-LoRA: every round starts from the leading directions of the weight, and goes to the weight.

Yan et al., "Federated Residual Low-Rank Adaption of Large Language Models", ICLR 2025
(openreview.net/forum?id=e0rQRMUhs7), Algorithm 1. Once, every adapted weight is split,

    W_0 = U S V^T,    B_0 = U_r sqrt(S_r / s),    A_0 = sqrt(S_r / s) V_r^T

and what is left, ``W = W_0 - s B_0 A_0``, is frozen: this is what PEFT does for
``init_lora_weights = "pissa"``, and the recipe must say so. In every round clients start from
``(A_0, B_0)`` and train both; with the mean factors ``A`` and ``B`` of the round, the weight takes
in the change,

    W <- W + s (B A - B_0 A_0)

and the adapter is ``(A_0, B_0)`` again. The model is ``W + s B_0 A_0``.

The product of mean factors is no mean of products: the residual of every round is lost, as FedIT
loses it. (With the residual added the round would be FedEx-LoRA with this adapter: not the paper.)
What the paper weights clients by was not to be seen; it is their training rows here. No code of
the authors is known. The adapter alone is never the model: what a run writes has all changes in it.
"""

from __future__ import annotations

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.methods.method import Method, Options
from fedexlora.methods.rule import ModuleRound, ModuleStep, Rule


def _server(module: ModuleRound) -> ModuleStep:
    start, mean = module.holder.previous, module.moments.mean
    wide = start.to(mean.dtype)
    # B A - B_0 A_0, by differences of factors, which lose nothing where these are alike.
    change = [Factors(mean.A, mean.B - wide.B), Factors(mean.A - wide.A, wide.B)]
    return ModuleStep(start, LowRank(stack(change)))


def _rule(options: Options) -> Rule:
    del options
    return Rule(_server, exact=False, certified=False, changes=(), start=("pissa",))


FRLORA = Method(
    name="frlora",
    title="FR-LoRA",
    paper="openreview:e0rQRMUhs7 (ICLR 2025)",
    sends="up A and B; down the change of their means' product, in factors",
    keeps="the change of the mean factors' product, in the frozen weight; the residual is lost",
    certified_against="nothing: its error is measured",
    stored="none",
    rule=_rule,
)
