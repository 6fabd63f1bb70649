"""What a server does with a round's updates, beside the official recipe in the same process.

Four tables: the step (sums, next version, deviation, step certificate and digests of one module,
without a model) against the recipe; cutting a remainder's rank against a dense singular value
decomposition; the peak memory of a process that reduces the modules of a 7B model one after the
other from files; and that memory as clients and rounds grow. Above them stands what the machine can
do at most. The recipe keeps K dense products, takes their mean, subtracts the product of the means
and adds the rest to the weight: as it is written, and with in-place ``addmm_``.

One thread, float32. Times are seconds of the processor, and the rivals take turns, so that what
else the machine does meets all of them: read the ratios. Memory is read from /proc, so on Linux.

    python benchmarks/server.py [--quick] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.moments import Moments
from fedexlora.algebra.product import truncate
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step import Step
from fedexlora.exchange.step_writer import StepBuilder
from fedexlora.methods import METHODS
from fedexlora.rounds import reduction
from fedexlora.rounds.common_update import CommonForm
from fedexlora.rounds.reduction import Reducer, WeightedUpdate, step_in_memory

SCALING = 2.0
STEPS = [(3, 32), (10, 32), (50, 8)]
"""Clients and ranks of the first table."""
HOLD = {(3, 32): (15, 25), (10, 32): (8, 12), (50, 8): (20, 30)}
"""By those: how many times faster than the recipe each of a size's shapes should be."""
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "shapes": [(3072, 3072), (8192, 3072)],
        "steps": STEPS,
        "square": 2048,
    },
    "quick": {
        "shapes": [(96, 64), (128, 96)],
        "steps": STEPS[:1],
        "square": 128,
    },
}


class FileUpdate:
    """One client's update of one module, whose factors are read when they are needed."""

    def __init__(self, factors: Sequence[Factors], place: int) -> None:
        self.client = str(place)
        self._factors, self._place = factors, place

    def factors(self, module: str) -> Factors:
        """What the client trained; there is one module."""
        del module
        return self._factors[self._place]

    def start(self, module: str) -> None:
        """It began from the common adapter."""


def our_step(
    factors: Sequence[Factors], weights: Sequence[float], before: GlobalState | None = None
) -> tuple[GlobalState, Step, float]:
    """A round of one module, without a model: everything that a server does with it.

    Args:
        factors: the clients'; read one after the other, as they may be on the disk.
        weights: what each client counts.
        before: the version that the clients trained from; by default a first one.

    Returns:
        That version, the step to the next one, and what the step's error is at most, relative to
        the ideal.
    """
    first = factors[0]
    module = ModuleSpec(*first.shape, first.rank, first.dtype, SCALING)
    if before is None:
        zero = LowRank.zeros(*first.shape, torch.float64)
        before = GlobalState(0, "0" * 64, {"m": first.scaled(0.0)}, {"m": zero}, {})
    form = CommonForm(before, AdapterSpec({"m": module}, {}, ("A", "B")), {})
    counted = [WeightedUpdate(FileUpdate(factors, i), weight) for i, weight in enumerate(weights)]
    rule = METHODS["fedex"].default
    made = Reducer(form, rule, lambda _: {}).reduce(counted, step_in_memory(before, rule))
    figures = made.modules["m"]
    return before, made.step, ratio(figures.error.bound, figures.ideal)


def recipe_step(factors: Sequence[Factors], weights: Sequence[float], weight: Tensor) -> Tensor:
    """The official recipe as it is written, with weights; the module's next weight."""
    shares = [w / sum(weights) for w in weights]
    products = [pair.B @ pair.A for pair in factors]
    mean = sum(p * product for p, product in zip(shares, products))
    mean_a, mean_b = mean_factors(factors, shares)
    residual = mean - mean_b @ mean_a
    return weight + SCALING * residual


def recipe_in_place(factors: Sequence[Factors], weights: Sequence[float], weight: Tensor) -> Tensor:
    """The same with one dense matrix beside the weight, which is written."""
    shares = [w / sum(weights) for w in weights]
    residual = torch.zeros_like(weight)
    for p, pair in zip(shares, factors):
        residual.addmm_(pair.B, pair.A, alpha=p)
    mean_a, mean_b = mean_factors(factors, shares)
    residual.addmm_(mean_b, mean_a, alpha=-1.0)
    return weight.add_(residual, alpha=SCALING)


def mean_factors(factors: Sequence[Factors], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    mean_a = sum(p * pair.A for p, pair in zip(shares, factors))
    return mean_a, sum(p * pair.B for p, pair in zip(shares, factors))


def drawn(shape: tuple[int, int], rank: int, seed: int) -> Factors:
    """Factors that differ between clients by about their own size."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (rank, shape[1]), (shape[0], rank)
    return Factors(*(0.02 * torch.randn(*x, generator=generator) for x in (a, b)))


def rows_of(clients: int) -> list[float]:
    """Unequal weights."""
    return [float(10 + i) for i in range(clients)]


def seconds_of(work: Callable[[], object]) -> float:
    """Of this process on the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


PARTS = {
    "moments": (Moments, "over"),
    "certificate": (Reducer, "_held"),
    "deviation": (reduction, "deviation"),
    "digests": (StepBuilder, "finish"),
}
"""By part of a step, the function that it is."""


def parts_of(factors: Sequence[Factors], weights: Sequence[float]) -> dict[str, float]:
    """Seconds of our step, by part."""
    parts: dict[str, float] = {}
    with ExitStack() as patches:
        for part, (owner, name) in PARTS.items():
            patches.enter_context(timed(parts, part, owner, name))
        start = time.process_time()
        _, _, error = our_step(factors, weights)
        whole = time.process_time() - start
    assert error <= 1e-6, error
    return {**parts, "else": whole - sum(parts.values())}


@contextmanager
def timed(parts: dict[str, float], part: str, owner: Any, name: str) -> Iterator[None]:
    """Have a function add its seconds to a part."""
    work = getattr(owner, name)

    def counted(*args, **options):
        start = time.process_time()
        found = work(*args, **options)
        parts[part] = parts.get(part, 0.0) + time.process_time() - start
        return found

    static = isinstance(vars(owner).get(name), staticmethod)
    before = vars(owner)[name]
    setattr(owner, name, staticmethod(counted) if static else counted)
    try:
        yield
    finally:
        setattr(owner, name, before)


def quarters(values: list[float]) -> dict[str, float]:
    """Median, and the quarters beside it."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def measure_step(shape: tuple[int, int], clients: int, rank: int, repeats: int) -> dict[str, Any]:
    """Our step against the recipe's two forms, which take turns."""
    factors = [drawn(shape, rank, i) for i in range(clients)]
    weights, weight = rows_of(clients), torch.randn(shape)
    parts_of(factors, weights)
    recipe_in_place(factors, weights, weight)
    written, parts, placed = [], [], []
    for _ in range(repeats):
        written.append(seconds_of(lambda: recipe_step(factors, weights, weight)))
        parts.append(parts_of(factors, weights))
        placed.append(seconds_of(lambda: recipe_in_place(factors, weights, weight)))
    ours = [sum(part.values()) for part in parts]
    return {
        "shape": list(shape),
        "clients": clients,
        "rank": rank,
        "ours": quarters(ours),
        "recipe": quarters(written),
        "in_place": quarters(placed),
        "faster": quarters([x / y for x, y in zip(written, ours)]),
        "faster_in_place": quarters([x / y for x, y in zip(placed, ours)]),
        "shares": {
            part: statistics.median(p[part] / sum(p.values()) for p in parts) for part in parts[0]
        },
    }


def measure_truncation(size: int, clients: int, rank: int, repeats: int) -> dict[str, Any]:
    """Cutting a round's remainder to a client's rank, against decomposing it as a matrix."""
    pieces = [drawn((size, size), rank, i) for i in range(clients)]
    stacked = Factors(torch.cat([x.A for x in pieces]), torch.cat([x.B for x in pieces], dim=1))
    truncate(stacked, rank)
    ours = [seconds_of(lambda: truncate(stacked, rank)) for _ in range(max(repeats, 3))]
    matrix = stacked.product()
    dense = seconds_of(lambda: torch.linalg.svd(matrix, full_matrices=False))
    found = {"size": size, "clients": clients, "rank": rank, "ours": quarters(ours)}
    return {**found, "dense": dense, "faster": dense / statistics.median(ours)}


def measure_limits(size: int, repeats: int) -> dict[str, float]:
    """What one thread can do at most: products, and copies of what no cache holds."""
    found = {}
    for name, dtype in (("f32", torch.float32), ("f64", torch.float64)):
        x, y = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        fastest = min(seconds_of(partial(torch.mm, x, y)) for _ in range(repeats + 1))
        found[f"gflops_{name}"] = 2e-9 * size**3 / fastest
    source = torch.randn(16 * size * size)
    target = torch.empty_like(source)
    fastest = min(seconds_of(partial(target.copy_, source)) for _ in range(repeats + 1))
    return {**found, "copied_gb": 8e-9 * source.numel() / fastest}


def text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """What was measured, for people."""
    limits = found["limits"]
    title = (
        f"One thread multiplies {limits['gflops_f32']:.0f} GFLOP/s in float32, "
        f"{limits['gflops_f64']:.0f} in float64, and copies {limits['copied_gb']:.1f} GB/s"
    )
    step = Table("module", "K", "r", "recipe ms", "in place ms", "ours ms", title=title)
    for column in ("recipe / ours", "hold", "in place / ours", "our time"):
        step.add_column(column)
    for row in found["steps"]:
        ms = [f"{1e3 * row[x]['median']:.1f}" for x in ("recipe", "in_place", "ours")]
        times, placed = row["faster"], row["faster_in_place"]["median"]
        faster = f"{times['median']:.1f} ({times['low']:.1f} to {times['high']:.1f})"
        shares = ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items())
        hold = str(row["hold"] or "")
        cells = [text(row["shape"]), str(row["clients"]), str(row["rank"]), *ms]
        step.add_row(*cells, faster, hold, f"{placed:.2f}", shares)
    yield step
    cut = found["truncation"]
    short = Table("cut to rank r", "K", "r", "ours ms", "dense SVD s", "dense / ours", "hold")
    ours, dense = f"{1e3 * cut['ours']['median']:.1f}", f"{cut['dense']:.2f}"
    cells = [text([cut["size"]] * 2), str(cut["clients"]), str(cut["rank"]), ours, dense]
    short.add_row(*cells, f"{cut['faster']:.0f}", "100")
    yield short
    peaks = Table("the reducing process", "peak MB", "of it the work's", "grown", "hold")
    for row in found["memory"]:
        grown = f"{row['grown']:.2f}" if "grown" in row else ""
        hold = "1.1" if "grown" in row else row.get("hold", "")
        peaks.add_row(row["what"], f"{row['peak']:.0f}", f"{row['work']:.0f}", grown, hold)
    yield peaks


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Everything, by table."""
    size = SIZES[name]
    found: dict[str, Any] = {"torch": torch.__version__, "repeats": repeats}
    found["limits"] = measure_limits(size["square"], repeats)
    found["steps"] = []
    for place, shape in enumerate(size["shapes"]):
        for clients, rank in size["steps"]:
            row = measure_step(shape, clients, rank, repeats)
            row["hold"] = HOLD[clients, rank][place] if name == "full" else None
            found["steps"].append(row)
            print(f"{text(shape)} K={clients}: {row['faster']['median']:.1f}", file=sys.stderr)
    found["truncation"] = measure_truncation(size["shapes"][0][0], *size["steps"][0], repeats)
    found["memory"] = measure_memory(name)
    return found


def measure_memory(name: str) -> list[dict[str, Any]]:
    """Peaks of the reducing process, which no other measurement has grown."""
    command = [sys.executable, str(Path(__file__).with_name("server_memory.py")), name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny modules: does it run?")
    parser.add_argument("--json", type=Path, help="also write every number there")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = measure("quick" if chosen.quick else "full", chosen.repeats)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(found):
        console.print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
