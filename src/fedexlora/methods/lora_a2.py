"""LoRA-A2: the halves in turn, and of each the ranks that matter to a client.

Koo, Jang and Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients", ACL 2025, arXiv:2410.22815, Algorithm 1 and eq. 4-6. In rounds 1, 3, 5, ... clients train
and send B while A, which all share, is frozen; in the others the other way round. A client first
trains one epoch, ``dB``, and undoes it. Rank i of a module, a slot, matters by

    |dB[:, i]| |A[i, :]|    or, in a round of A,    |B[:, i]| |dA[i, :]|

and the ``local_rank`` x modules slots that matter most, over all modules together, are trained for
the client's epochs: after every step the others are put back. The server adds the weighted mean of
the changes to the active half, a slot that nobody chose moves by 0, and nothing is divided by how
many chose one. The other half is common, so that the mean of the products is applied: exactly.

Chosen here: scores are of ``B A`` without PEFT's scaling, and half of all slots are trained if no
``local_rank`` is given. The paper's learning rate for B is five times that for A; here both have
the recipe's. A client sends its whole active half, in which slots that it did not choose are as it
received them: the model is that of the paper, and uploads are not as small as the paper's.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fedexlora.algebra import assignment
from fedexlora.algebra.factors import Factors
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import ClientRound, ClientRule, Rule, Slots, Trainables


class LoRAA2Options(Options):
    """How much a client trains."""

    local_rank: int | None = Field(default=None, ge=1)
    """How many ranks of a module a client trains, on average over all modules; half of the
    adapter's if not given, and all if it has no more."""


def scores(trained: Factors, received: Factors) -> Tensor:
    """What every rank of a module matters, ``(R,)``, float64.

    One of the two terms is 0, that of the half that is frozen.
    """
    new, old = trained.to(torch.float64), received.to(torch.float64)
    norm = torch.linalg.vector_norm
    of_b: Tensor = norm(new.B - old.B, dim=0) * norm(old.A, dim=1)
    of_a: Tensor = norm(new.A - old.A, dim=1) * norm(old.B, dim=0)
    return of_b + of_a


def chosen(found: dict[str, Tensor], local_rank: int | None) -> Slots:
    """The slots that matter most over all modules; of equal ones, the first.

    Args:
        found: by module, what every rank matters.
        local_rank: how many of a module's are trained, on average; None for half of all.
    """
    every = torch.cat(list(found.values()))
    count = (len(every) + 1) // 2 if local_rank is None else local_rank * len(found)
    best = every.sort(descending=True, stable=True).indices[:count]
    mask = torch.zeros(len(every), dtype=torch.bool).index_fill(0, best, True)
    parts = torch.split_with_sizes(mask, [len(x) for x in found.values()])
    return dict(zip(found, parts, strict=True))


def _rule(options: LoRAA2Options) -> Rule:
    def slots(at: ClientRound, probed: Trainables) -> Slots:
        before = at.received.factors
        found = {name: scores(pair, before[name]) for name, pair in probed.factors.items()}
        return chosen(found, options.local_rank)

    return Rule(
        next_adapter(assignment.mean, assignment.drop),
        exact=True,
        certified=True,
        halves=(("B",), ("A",)),
        client=ClientRule(slots=slots),
    )


LORA_A2 = Method(
    name="lora_a2",
    title="LoRA-A2",
    paper="arXiv:2410.22815 (ACL 2025)",
    sends="up B in odd rounds and A in even ones, of which some ranks have changed; down its mean",
    keeps="nothing is left over: the other half is frozen and shared",
    certified_against="the ideal",
    stored="none",
    rule=_rule,
    options=LoRAA2Options,
)
