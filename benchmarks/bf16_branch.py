"""What a server that computes in bfloat16 loses of a small adapter, beside the weight and merged.

The layer's output ``W x`` is rounded to bfloat16; a branch of the adapter is added to it and the
sum is rounded again. What moves the output is the slope of the regression of (output with the
adapter - output without) on the exact product ``B A x``: 1 is all of it. Merged, ``W + B A`` is
rounded to bfloat16 once.

    python benchmarks/bf16_branch.py [--width 1024] [--rank 16]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

WEIGHT_STD = 0.02
PRODUCT_STDS = (1e-3, 1e-4, 1e-5)
TOKENS = 256


def share(moved: Tensor, exact: Tensor) -> float:
    """The slope of the regression of ``moved`` on ``exact``, through the origin, in float64."""
    return float((moved.double() * exact).sum() / (exact * exact).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(0)
    narrow, width, rank = torch.bfloat16, options.width, options.rank
    weight = (WEIGHT_STD * torch.randn(width, width)).to(narrow)
    x = torch.randn(TOKENS, width).to(narrow)
    plain = x @ weight.T  # bfloat16, summed in float32
    print("std of B A   beside W in bf16   merged in bf16   beside W in float32")
    for std in PRODUCT_STDS:
        a = torch.randn(rank, width)
        b = torch.randn(width, rank) * (std / rank**0.5)
        exact = x.double() @ a.double().T @ b.double().T
        branch = x @ a.to(narrow).T @ b.to(narrow).T
        beside = (plain + branch) - plain.double()
        merged = x @ (weight.float() + b @ a).to(narrow).T - plain.double()
        wide = x.float() @ weight.float().T
        kept = (wide + x.float() @ a.T @ b.T) - wide.double()
        shares = (share(moved, exact) for moved in (beside, merged, kept))
        print(f"{std:10.0e}  " + "  ".join(f"{100 * value:15.1f} %" for value in shares))


if __name__ == "__main__":
    main()
