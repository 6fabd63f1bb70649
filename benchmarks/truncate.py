"""Rank-R means of adapters: ours against PEFT's ``add_weighted_adapter(combination_type="svd")``.

On the attention layers of Llama-3.2-3B: q and o are 3072 by 3072, k and v 1024 by 3072. Both sides
combine three adapters of rank 32 with weights 1:2:5 to rank 32, turn by turn in one process; times
are medians. Only the combination is timed: everything is in memory on both sides.

    python benchmarks/truncate.py [--layers 2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.product_sum import ProductSum, Term

SHAPES = {"q_proj": (3072, 3072), "k_proj": (1024, 3072), "v_proj": (1024, 3072)} | {
    "o_proj": (3072, 3072)
}
WEIGHTS = (0.125, 0.25, 0.625)
RANK, SCALING = 32, 2.0


def model(layers: int) -> torch.nn.Module:
    """The attention projections of some layers, and nothing else."""
    return torch.nn.ModuleDict(
        {
            f"layer_{i}": torch.nn.ModuleDict(
                {
                    name: torch.nn.Linear(shape[1], shape[0], bias=False)
                    for name, shape in SHAPES.items()
                }
            )
            for i in range(layers)
        }
    )


def adapted(layers: int):
    config = LoraConfig(r=RANK, lora_alpha=RANK * SCALING, target_modules=list(SHAPES))
    peft = get_peft_model(model(layers), config, adapter_name="c0")
    for name in ("c1", "c2"):
        peft.add_adapter(name, config)
    for path, parameter in peft.named_parameters():
        if "lora_" in path:
            torch.nn.init.normal_(parameter, std=0.02)
    return peft


def lora_layers(peft):
    return {n: m for n, m in peft.named_modules() if hasattr(m, "get_delta_weight")}


def ours(peft) -> dict[str, Factors]:
    found = {}
    for name, layer in lora_layers(peft).items():
        terms = []
        for i, weight in enumerate(WEIGHTS):
            a, b = layer.lora_A[f"c{i}"].weight, layer.lora_B[f"c{i}"].weight
            pair = Factors(a.detach(), b.detach())
            terms.append(Term.of(pair, weight * layer.scaling[f"c{i}"]))
        total = ProductSum(layer.out_features, layer.in_features, terms)
        found[name] = total.at_rank(RANK).factors()
    return found


def theirs(peft) -> None:
    if "svd" in peft.peft_config:
        peft.delete_adapter("svd")
    peft.add_weighted_adapter(
        ["c0", "c1", "c2"], list(WEIGHTS), "svd", combination_type="svd", svd_rank=RANK
    )


def errors(peft, found: dict[str, Factors]) -> tuple[float, float, float]:
    """Relative errors of ours, theirs and the dense optimum, worst layer of the first block."""
    worst = [0.0, 0.0, 0.0]
    for name, layer in list(lora_layers(peft).items())[: len(SHAPES)]:
        ideal = sum(
            w * layer.get_delta_weight(f"c{i}").detach().double() for i, w in enumerate(WEIGHTS)
        )
        s = torch.linalg.svdvals(ideal)
        mine = found[name].to(torch.float64).product()
        peft_one = layer.get_delta_weight("svd").detach().double()
        both = [float((x - ideal).norm() / ideal.norm()) for x in (mine, peft_one)]
        here = [*both, float(s[RANK:].norm() / s.norm())]
        worst = [max(x, y) for x, y in zip(worst, here)]
    return worst[0], worst[1], worst[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    peft = adapted(chosen.layers)
    times: dict[str, list[float]] = {"ours": [], "peft": []}
    found = ours(peft)
    for _ in range(chosen.repeats):
        start = time.perf_counter()
        found = ours(peft)
        middle = time.perf_counter()
        theirs(peft)
        times["ours"].append(middle - start)
        times["peft"].append(time.perf_counter() - middle)
    mine, other = (statistics.median(times[name]) for name in ("ours", "peft"))
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"{chosen.layers} layer(s) of attention, 3 adapters of rank {RANK} to rank {RANK}, "
        f"{chosen.repeats} turns"
    )
    print(f"ours {mine:.3f} s, PEFT svd {other:.3f} s: {other / mine:.0f} x")
    print("ratios of single turns:", [f"{p / o:.0f}" for o, p in zip(times["ours"], times["peft"])])
    e_ours, e_peft, optimum = errors(peft, found)
    print(f"relative error: ours {e_ours:.6f}, PEFT {e_peft:.6f}, dense optimum {optimum:.6f}")


if __name__ == "__main__":
    main()
