"""What a recipe may change about FedEx-LoRA: the next adapter, and how much remainder is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from fedexlora.algebra import assignment
from fedexlora.algebra.assignment import Assignment
from fedexlora.methods.method import Method

NEXT_ADAPTERS: Mapping[str, Assignment] = MappingProxyType(
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


def option_faults(
    method: Method, next_adapter: str, rank: int | None, energy: float | None
) -> list[str]:
    """Why a method cannot be combined with these options; one line each."""
    given = {
        "next_adapter": next_adapter != "mean",
        "remainder_rank": rank is not None,
        "remainder_energy": energy is not None,
    }
    faults = []
    if method.remainder is not assignment.keep:
        faults += [
            f"federation.{key}: {method.name} has no such choice; only fedex keeps the remainder"
            for key, is_given in given.items()
            if is_given
        ]
    if rank is not None and energy is not None:
        faults.append("federation.remainder_energy: give it or remainder_rank, not both")
    return faults


def with_options(
    method: Method, next_adapter: str, rank: int | None, energy: float | None
) -> Method:
    """A method with the options of a recipe.

    Args:
        method: the method; unchanged.
        next_adapter: a key of :data:`NEXT_ADAPTERS`.
        rank: keep this many directions of every round's remainder; None for all.
        energy: keep this share of every round's remainder's squared norm; None for all.

    Raises:
        ValueError: if :func:`option_faults` finds any.
    """
    if faults := option_faults(method, next_adapter, rank, energy):
        raise ValueError("; ".join(faults))
    if next_adapter != "mean":
        own = next_adapter == "keep"
        method = replace(method, assignment=NEXT_ADAPTERS[next_adapter], own_adapters=own)
    if rank is not None:
        method = replace(method, remainder=assignment.truncate_to_rank(rank))
    elif energy is not None:
        method = replace(method, remainder=assignment.truncate_to_energy(energy))
    else:
        return method
    return replace(method, exact=False, truncates=True)
