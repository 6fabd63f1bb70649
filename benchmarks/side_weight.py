"""Memory and step time of a remainder beside the weight, against one folded into it.

python benchmarks/side_weight.py            # prints a Markdown table
python benchmarks/side_weight.py --size 1024 --repeats 3

One linear layer with a trained LoRA adapter of rank 16; a step is a forward and a backward pass
over 128 tokens. The variants take turns, so that what else the machine does hits all of them; a
ratio is the median over the turns of time against the plain adapter in the same turn.
"""

import argparse
import platform
import statistics
import time
from collections import defaultdict

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, break_even
from fedexlora.peft_bridge.model import REMAINDER, AdaptedModel

RANKS = (8, 16, 32, 64, 128, 256, 512)
TOKENS = 128


def layer(size, dtype):
    base = nn.Sequential(nn.Linear(size, size, bias=False, dtype=dtype))
    config = LoraConfig(target_modules=["0"], r=16, lora_alpha=32)
    return AdaptedModel(get_peft_model(base, config), placement="side")


def place(model, size, rank):
    """Put a remainder of this rank beside the weight; None for a dense one."""
    if rank is None:
        matrix = LowRank(torch.randn(size, size) * 1e-3)
    else:
        matrix = LowRank(Factors(torch.randn(rank, size), torch.randn(size, rank) * 1e-3))
    (module,) = model.modules.values()
    module.set_side(REMAINDER, None if rank == 0 else matrix, module.scaling)
    return 4 * matrix.numel if rank != 0 else 0


def step(model, x):
    started = time.perf_counter()
    model.peft_model(x).float().sum().backward()
    return time.perf_counter() - started


def measure(size, dtype, repeats):
    model = layer(size, dtype)
    x = torch.randn(TOKENS, size, dtype=dtype, requires_grad=True)
    times, extra = defaultdict(list), {}
    for turn in range(repeats + 1):
        for rank in (0, *RANKS, None):
            extra[rank] = place(model, size, rank)
            step(model, x)
            taken = min(step(model, x), step(model, x))
            if turn:
                times[rank].append(taken)
    ratios = {
        rank: statistics.median(t / plain for t, plain in zip(times[rank], times[0]))
        for rank in times
    }
    return extra, ratios, statistics.median(times[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    size = options.size
    found = {d: measure(size, d, options.repeats) for d in (torch.float32, torch.bfloat16)}
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"{size} by {size}, {TOKENS} tokens, {options.repeats} turns; plain step "
        + ", ".join(f"{found[d][2] * 1e3:.0f} ms {str(d)[6:]}" for d in found)
        + f"; factors are smaller than dense below rank {break_even(size, size)}\n"
    )
    print("| remainder | MB beside the weight | step, float32 base | step, bfloat16 base |")
    print("|---|---:|---:|---:|")
    for rank in (0, *RANKS, None):
        name = {0: "folded, or none", None: "dense"}.get(rank, f"rank {rank}")
        extra = found[torch.float32][0][rank] / 1e6
        ratios = " | ".join(f"{found[d][1][rank]:.2f} x" for d in found)
        print(f"| {name} | {extra:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
