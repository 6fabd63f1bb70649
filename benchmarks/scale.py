"""What rounds cost as they grow: the numbers of docs/scale.md.

    python benchmarks/scale.py cost [--plot FILE.svg]    # a step against K, r, size and rounds
    python benchmarks/scale.py sizes                     # bytes of rounds of 3B, 7B and 70B models
    python benchmarks/scale.py truncation                # what remainder_rank leaves out
    python benchmarks/scale.py tree                      # sums of sums against one sum

One thread; times are the least seconds of the processor of several repeats. `sizes` computes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from server import drawn, our_step, rows_of, text

from fedexlora.algebra.deviation import deviation
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import break_even
from fedexlora.algebra.moments import Moments
from fedexlora.algebra.product import truncate

SHAPE = (1536, 1024)
RANK = 8
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Model:
    """The linear layers of a model: shapes of one layer, with how often it has each."""

    name: str
    layers: int
    hidden: int
    keys: int
    inner: int

    def shapes(self) -> list[tuple[int, tuple[int, int]]]:
        """``(count, (d_out, d_in))`` in one layer."""
        d = self.hidden
        return [(2, (d, d)), (2, (self.keys, d)), (2, (self.inner, d)), (1, (d, self.inner))]

    def numbers(self, of: Callable[[int, int], int]) -> int:
        """The sum over all modules of what ``of`` says of a shape."""
        return self.layers * sum(n * of(*shape) for n, shape in self.shapes())


MODELS = [
    Model("Llama-3.2-3B", 28, 3072, 1024, 8192),
    Model("Mistral-7B", 32, 4096, 1024, 14336),
    Model("Llama-3-70B", 80, 8192, 1024, 28672),
]


def least(work: Callable[[], object]) -> float:
    """Seconds."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def step_seconds(shape: tuple[int, int], clients: int, rank: int) -> float:
    factors = [drawn(shape, rank, i) for i in range(clients)]
    return least(lambda: our_step(factors, rows_of(clients)))


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log y over log x, by least squares."""
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)


def rounds_seconds(rounds: int) -> list[tuple[float, float]]:
    """A round's seconds by its number, of a chain of them; each the mean of ten."""
    shape, state = (384, 256), None
    factors = [[drawn(shape, 4, 3 * t + i) for i in range(3)] for t in range(rounds)]
    marks = [time.process_time()]
    for sent in factors:
        before, step, _ = our_step(sent, rows_of(3), state)
        state = before.advance([step])
        marks.append(time.process_time())
    return [(t + 5.0, (marks[t + 10] - marks[t]) / 10) for t in range(0, rounds, 10)]


def cost(plot: Path | None) -> None:
    """A step's time against what grows, with the exponent that fits."""
    m, n = SHAPE
    bound = break_even(m, n) / RANK
    print(f"one module of {m}×{n}, whose remainder is dense from rank {break_even(m, n)} on")
    clients = [(float(k), step_seconds(SHAPE, k, RANK)) for k in (4, 8, 16, 32, 64, 96, 128, 192)]
    ranks = [(float(r), step_seconds(SHAPE, 4, r)) for r in (4, 8, 16, 32, 64, 128)]
    sides = [(float(d), step_seconds((d, d), 4, RANK)) for d in (256, 512, 1024, 2048, 4096)]
    rounds = rounds_seconds(200)
    dense = [p for p in clients if p[0] > bound + 1]
    series = {
        "clients K, r=8, as factors": [p for p in clients if p[0] < bound / 2],
        "clients K, r=8, dense": dense,
        "rank r, K=4, as factors": [p for p in ranks if 4 * p[0] < bound * RANK / 2],
        "side of a square, K=4, r=8": sides,
        "round t, 384×256, K=3, r=4, from 50 on": rounds[5:],
    }
    for name, points in series.items():
        ends = " to ".join(f"{1e3 * points[i][1]:.1f} ms at {points[i][0]:.0f}" for i in (0, -1))
        print(f"| {name} | {ends} | {exponent(points):.2f} |")
    if plot:
        draw(plot, {"clients, r=8": clients, "rank, 4 clients": ranks, "side, 4 clients": sides})


def draw(out: Path, series: dict[str, list[tuple[float, float]]]) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"  # text as text: a fifth of the size
    figure, axes = plt.subplots(1, len(series), figsize=(9, 2.8), sharey=True, layout="constrained")
    for axis, (name, points) in zip(axes, series.items()):
        axis.loglog(*zip(*((x, 1e3 * y) for x, y in points)), "o-", markersize=4)
        axis.set_xticks([], minor=True)
        axis.set_xticks([x for x, _ in points], [f"{x:.0f}" for x, _ in points], fontsize=7)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].axvline(break_even(*SHAPE) / RANK + 1, color="grey", linestyle="--")
    axes[0].set_ylabel("ms a step")
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def sizes() -> None:
    """When remainders turn dense, and what rounds of a few models need."""
    print("| module | dense from rank | K at r=8 | r=16 | r=32 | r=64 |")
    for model in MODELS:
        for _, shape in model.shapes()[:-1]:  # the last is one of them, turned
            bound = break_even(*shape)
            needed = " | ".join(str(-(-bound // r) + 1) for r in (8, 16, 32, 64))
            print(f"| {model.name} {text(shape)} | {bound} | {needed} |")
    print("| model, r=32 | update | K=10 down | K=100 down | dense | largest module f64 |")
    for model in MODELS:
        update = 4 * model.numbers(lambda m, n: 32 * (m + n))
        dense = 4 * model.numbers(lambda m, n: m * n)
        down = []
        for clients in (10, 100):
            kept = model.numbers(lambda m, n, k=clients: min((k - 1) * 32 * (m + n), m * n))
            down.append(update + 4 * kept)
        largest = 8 * max(m * n for _, (m, n) in model.shapes())
        cells = " | ".join(f"{x / 1e9:.2f} GB" for x in (update, *down, dense, largest))
        print(f"| {model.name} | {cells} |")
    print("| model, r=32, 10,000 clients | arrive | at 10 Gbit/s | products, one thread |")
    for model in MODELS:
        update = 4 * model.numbers(lambda m, n: 32 * (m + n))
        flops = 2.0 * 32 * 10_000 * model.numbers(lambda m, n: m * n)
        hours = flops / 90e9 / 3600
        wire = 1e4 * update / 1.25e9 / 3600
        print(f"| {model.name} | {update / 1e8:.1f} TB | {wire:.1f} h | {hours:.0f} h |")


def clients_of(shape: tuple[int, int], clients: int, spread: float, decay: float) -> Moments:
    """Clients around common factors, whose differences fall off as ``j ** -decay``.

    ``spread`` is the size of the differences over that of the common factors. With ``decay`` 0
    every client moves in directions of its own; else all move in the same ones, less and less.
    """
    torch.manual_seed(0)
    m, n = shape
    common = drawn(shape, RANK, 0).to(torch.float64)
    scale = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -decay
    scale = spread * 0.02 * scale / scale.square().mean().sqrt()
    left = torch.linalg.qr(torch.randn(m, min(m, n), dtype=torch.float64)).Q * scale
    right = (torch.linalg.qr(torch.randn(n, min(m, n), dtype=torch.float64)).Q * scale).T
    moments = None
    for weight in rows_of(clients):
        a = common.A + torch.randn(RANK, right.shape[0], dtype=torch.float64) @ right
        b = common.B + left @ torch.randn(left.shape[1], RANK, dtype=torch.float64)
        pair = Factors(a, b)
        moments = moments.add(pair, weight) if moments else Moments.of(pair, weight, torch.float64)
    return moments


def truncation() -> None:
    """What is left out at a rank: of the remainder, and in brackets of the whole update."""
    shape = (768, 512)
    bound, ranks = break_even(*shape), [k * RANK for k in (1, 2, 4, 8, 16)]
    print(f"{text(shape)}, r={RANK}: a remainder is dense from K={-(-bound // RANK) + 1} on")
    print(f"| K | differences | deviation | {' | '.join(f'rank {rank}' for rank in ranks)} |")
    for clients in (10, -(-bound // RANK)):
        for decay in (0.0, 0.5, 1.0):
            moments = clients_of(shape, clients, 1.0, decay)
            lost, value = deviation(moments).relative, moments.residual().value
            shares = [truncate(value, rank).share for rank in ranks]
            cells = " | ".join(f"{share:.2f} ({share * lost:.3f})" for share in shares)
            how = f"j^-{decay:g}" if decay else "j^0"
            print(f"| {clients} | {how} | {lost:.3f} | {cells} |")


def tree() -> None:
    """Eight coordinators of sixteen clients against one of all: error and what each sends."""
    shape = SHAPE
    clients = [drawn(shape, RANK, i) for i in range(128)]
    weights = rows_of(len(clients))

    def line(some: Sequence[int]) -> Moments:
        return Moments.over((clients[i], weights[i]) for i in some)

    leaves = [line(range(i, i + 16)) for i in range(0, 128, 16)]

    def root() -> Moments:
        whole = leaves[0]
        for leaf in leaves[1:]:
            whole = whole.merge(leaf)
        return whole

    one, whole = line(range(128)), root()
    apart = float((whole.residual().dense() - one.residual().dense()).norm())
    print(f"residual of the tree against the line's: {apart / one.residual().dense().norm():.1e}")
    print(f"mean: {float((whole.mean.A - one.mean.A).norm() / one.mean.A.norm()):.1e}")
    alone, leaf, top = least(lambda: line(range(128))), least(lambda: line(range(16))), least(root)
    ms = [f"{1e3 * seconds:.0f} ms" for seconds in (alone, leaf, top)]
    print(f"one sum {ms[0]}; a leaf {ms[1]}, the root {ms[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "sizes", "truncation", "tree"])
    parser.add_argument("--plot", type=Path, help="of cost: draw it there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.what == "cost":
        cost(chosen.plot)
    else:
        {"sizes": sizes, "truncation": truncation, "tree": tree}[chosen.what]()


if __name__ == "__main__":
    main()
