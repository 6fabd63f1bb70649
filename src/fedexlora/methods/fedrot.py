"""FedRot-LoRA: clients turn their factors towards the common ones before they send them.

Zhang, Kim, Cha and Vikalo, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA",
2026, arXiv:2602.23638, and the authors' code. A client's product is the same for ``(B Q, Q^T A)``
with any orthogonal ``Q``; averaging factors is not. From round 2 on, even rounds align A and odd
ones B with the global factors of the round:

    even    Q = U V^T of  A_i A^T = U S V^T
    odd     Q = U V^T of  B_i^T B = U S V^T

The hard rule takes that Q, reflections included. The soft one takes a rotation between the identity
and it: the determinant of Q is made positive, and ``(1 - strength) I + strength Q = U' S' V'^T``
gives ``U' V'^T``. The server then averages factors, and loses the residual as FedIT does.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fedexlora.algebra import assignment
from fedexlora.algebra.factors import Factors
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import ClientRound, ClientRule, Memory, Rule, Trainables


class FedRotOptions(Options):
    """How far clients turn."""

    strength: float | None = Field(default=None, ge=0.0, le=1.0)
    """The paper's lambda: 0 does not turn, 1 turns all the way, as a rotation. If not given, all
    the way and reflections too, as in the authors' recipes."""


def turn(trained: Factors, received: Factors, round_: int, strength: float | None) -> Factors:
    """The same product as what was trained, with factors nearer to those that were received.

    Args:
        trained: ``A (R, N)`` and ``B (M, R)``.
        received: the global factors that the client started from.
        round_: from 1; the first does not turn.
        strength: as in :class:`FedRotOptions`.
    """
    if round_ == 1 or strength == 0.0:
        return trained
    own, common = trained.to(torch.float64), received.to(torch.float64)
    cross = own.A @ common.A.T if round_ % 2 == 0 else own.B.T @ common.B
    q = _turn(cross, strength)
    return Factors(q.T @ own.A, own.B @ q).to(trained.dtype)


def _turn(cross: Tensor, strength: float | None) -> Tensor:
    u, _, vh = torch.linalg.svd(cross)
    nearest: Tensor = u @ vh
    if strength is None:
        return nearest
    if torch.linalg.det(nearest) < 0:
        nearest = u @ torch.cat([vh[:-1], -vh[-1:]])
    between = (1.0 - strength) * torch.eye(len(cross), dtype=cross.dtype) + strength * nearest
    u, _, vh = torch.linalg.svd(between)
    rotation: Tensor = u @ vh
    return rotation


def _rule(options: FedRotOptions) -> Rule:
    def leave(at: ClientRound, trained: Trainables) -> tuple[Trainables, Memory]:
        received = at.received.factors
        factors = {
            name: turn(pair, received[name], at.round, options.strength)
            for name, pair in trained.factors.items()
        }
        return Trainables(factors, trained.heads), {}

    return Rule(
        next_adapter(assignment.mean, assignment.drop),
        exact=False,
        certified=False,
        client=ClientRule(leave=leave),
    )


FEDROT = Method(
    name="fedrot",
    title="FedRot-LoRA",
    paper="arXiv:2602.23638 (2026)",
    sends="up A and B, turned towards the common ones; down mean A and mean B",
    keeps="nothing: what is left of the residual is lost",
    certified_against="nothing: its error is measured",
    stored="none",
    rule=_rule,
    options=FedRotOptions,
)
