"""FLoRIST: as FLoRA, with the stacked update cut to the directions that hold most of it.

Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated
Fine-Tuning of Large Language Models", 2025, arXiv:2506.09199, and the authors' code. Every client
starts a round from an A of its own and ``B = 0``. Of the stacked update, module by module,

    sum_i p_i B_i A_i = U S V^T,    k = min{k : sum_(j<=k) s_j^2 >= energy sum_j s_j^2},

the first ``k`` directions go to the frozen weight, and the rest is left out, by how much is stated.
With ``energy = 1`` it is FLoRA. The paper decomposes the stacks of A and of B and then a core; here
it is one QR of each, which is the same decomposition. Where clients are so many that the update is
dense, has more than 1,024 rows and columns and needs more than half of its directions, all of it is
kept, as factors would be no smaller. Its two variants, -O and -E, are two choices
of the energy. Any ranks fit, and scalings may differ, as in FLoRA.

Other copies: the authors tell A from B by which side is as long as the rank, which is wrong where
a layer's is.
"""

from __future__ import annotations

from pydantic import Field

from fedexlora.algebra import assignment
from fedexlora.methods.flora import start_anew
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import ClientRule, Rule


class FLoRISTOptions(Options):
    """How much of an update is kept."""

    energy: float = Field(default=0.9, gt=0.0, le=1.0)
    """The share of every module's update that is kept, by its squared norm; 1 keeps all."""


def _rule(options: FLoRISTOptions) -> Rule:
    whole = options.energy == 1.0
    kept = assignment.keep if whole else assignment.truncate_to_energy(options.energy)
    return Rule(
        next_adapter(assignment.fresh, kept, states_loss=not whole),
        exact=whole,
        certified=True,
        client=ClientRule(enter=start_anew),
        mixed_ranks=True,
        makes_up=False,
        fresh_start=True,
        draws=True,
    )


FLORIST = Method(
    name="florist",
    title="FLoRIST",
    paper="arXiv:2506.09199 (2025)",
    sends="up A and B; down the kept directions of the mean update, and new factors",
    keeps="the kept directions of the mean update, in the frozen weight",
    certified_against="the ideal less what is cut off, which is stated",
    stored="none",
    rule=_rule,
    options=FLoRISTOptions,
)
