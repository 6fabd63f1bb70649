"""FedEx-LoRA: average the factors and give the residual to the frozen weight.

Singhal, Ponkshe and Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient
Fine-Tuning of Large Language Models", ACL 2025, arXiv:2410.09432, eq. 9-16. The paper weights
clients equally; here the weights are the clients' numbers of training examples. Any other next
adapter is as exact (Sec. 3.2, Table 4), with its own remainder; less of the remainder is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Self

from pydantic import Field, model_validator

from fedexlora.algebra import assignment
from fedexlora.algebra.assignment import Assignment, RemainderRule
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import Rule

NextAdapter = Literal["mean", "svd", "svd_aligned", "reinit", "keep"]
NEXT_ADAPTERS: Mapping[NextAdapter, Assignment] = MappingProxyType(
    {
        "mean": assignment.mean,
        "svd": assignment.best,
        "svd_aligned": assignment.best_aligned,
        "reinit": assignment.fresh,
        # The server's own copy, that of nobody, continues from the mean.
        "keep": assignment.mean,
    }
)
"""What clients may continue from, by the name that recipes use."""


class FedExOptions(Options):
    """What clients continue from, and how much of the remainder is kept."""

    next_adapter: NextAdapter = "mean"
    """What clients continue from; the rest of the mean update goes to the frozen weight."""
    remainder_rank: int | None = Field(default=None, ge=1)
    """Keep this many directions of every round's remainder, with the error stated; all if not
    given."""
    remainder_energy: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Keep this share of every round's remainder, by its squared norm, with the error stated."""

    @model_validator(mode="after")
    def _one_truncation(self) -> Self:
        if self.remainder_rank is not None and self.remainder_energy is not None:
            raise ValueError("give remainder_energy or remainder_rank, not both")
        return self

    @property
    def remainder(self) -> RemainderRule:
        """What of the remainder is kept."""
        if self.remainder_rank is not None:
            return assignment.truncate_to_rank(self.remainder_rank)
        if self.remainder_energy is not None:
            return assignment.truncate_to_energy(self.remainder_energy)
        return assignment.keep


def _rule(options: FedExOptions) -> Rule:
    kept = options.remainder
    whole = kept is assignment.keep
    return Rule(
        next_adapter(NEXT_ADAPTERS[options.next_adapter], kept, states_loss=not whole),
        exact=whole,
        certified=True,
        own_adapters=options.next_adapter == "keep",
        draws=options.next_adapter in ("svd", "svd_aligned", "reinit"),
        mixed_ranks=True,
        late_updates=True,
    )


FEDEX = Method(
    name="fedex",
    title="FedEx-LoRA",
    paper="arXiv:2410.09432 (ACL 2025)",
    sends="up A and B; down mean A, mean B and the residual in factors",
    keeps="residual, exactly, in the frozen weight",
    certified_against="the ideal; less what a truncated remainder lacks, which is stated",
    stored="products",
    rule=_rule,
    options=FedExOptions,
)
