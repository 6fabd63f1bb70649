"""Peak memory of a process that does a server's part of rounds, one module after the other.

The updates lie on the disk, a file a client. First a round of a 7B model with many clients, then a
small module as clients and rounds grow. Every peak is that of a process of its own, as /proc has
it, so on Linux; beside it stands how much of it came with the work.

    python benchmarks/server_memory.py [quick]    # prints JSON; benchmarks/server.py shows it
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from server import drawn, our_step, rows_of, text

from fedexlora.algebra.factors import Factors

SIZES: dict[str, dict[str, Any]] = {
    "full": {
        # The linear layers of Mistral-7B, one of each shape.
        "modules": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
        "round": (100, 32),
        "small": (1024, 512),
        "growth": (10, 1000),
    },
    "quick": {
        "modules": [(64, 64), (96, 64)],
        "round": (4, 2),
        "small": (48, 32),
        "growth": (2, 6),
    },
}


class Spool(Sequence[Factors]):
    """One module's factors of all clients, each client a file, read when they are needed."""

    def __init__(self, folder: Path, clients: int, module: int) -> None:
        self._folder, self._clients, self._module = folder, clients, module

    def __len__(self) -> int:
        return self._clients

    def __getitem__(self, i):
        if not 0 <= i < self._clients:
            raise IndexError(i)
        with safe_open(self._folder / f"{i:04d}.safetensors", "pt") as file:
            return Factors(*(file.get_tensor(f"{letter}/{self._module}") for letter in "AB"))

    @staticmethod
    def write(folder: Path, shapes: Sequence[tuple[int, int]], clients: int, rank: int) -> None:
        """Store a round's updates of modules of these shapes."""
        for i in range(clients):
            pairs = {m: drawn(shape, rank, 1000 * i + m) for m, shape in enumerate(shapes)}
            tensors = {f"A/{m}": pair.A for m, pair in pairs.items()}
            tensors |= {f"B/{m}": pair.B for m, pair in pairs.items()}
            save_file(tensors, folder / f"{i:04d}.safetensors")


def memory(field: str) -> float:
    """MB of this process: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def reduce_modules(folder: str, clients: str, modules: str) -> None:
    """One round of several modules, from files, one after the other."""
    for module in range(int(modules)):
        our_step(Spool(Path(folder), int(clients), module), rows_of(int(clients)))


def reduce_rounds(folder: str, clients: str, rounds: str) -> None:
    """Many rounds of one module, each from the version before."""
    state = None
    for _ in range(int(rounds)):
        spool = Spool(Path(folder), int(clients), 0)
        before, step, _ = our_step(spool, rows_of(int(clients)), state)
        state = before.advance([step])


WORK = {"modules": reduce_modules, "rounds": reduce_rounds}


def peak(work: str, *words: str) -> dict[str, float]:
    """MB of this process at its peak, and how much of that came with the work."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    WORK[work](*words)
    highest = memory("VmHWM")
    return {"peak": highest, "work": highest - before}


def peak_of(*words: object) -> dict[str, float]:
    """The same of a process of its own."""
    command = [sys.executable, __file__, "peak", *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure_memory(size: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Peaks of the reducing process: a round of a 7B model, and as clients and rounds grow."""
    clients, rank = size["round"]
    shapes = size["modules"]
    with tempfile.TemporaryDirectory() as folder:
        Spool.write(Path(folder), shapes, clients, rank)
        what = f"{len(shapes)} modules up to {text(max(shapes))}, r={rank}, {clients} clients"
        yield {"what": what, "hold": "2000", **peak_of("modules", folder, clients, len(shapes))}
    few, many = size["growth"]
    shape = f"{text(size['small'])}, r=8"
    with tempfile.TemporaryDirectory() as folder:
        Spool.write(Path(folder), [size["small"]], many, 8)
        for of in ("clients", "rounds"):
            found = []
            for n in (few, many):
                words = ("modules", folder, n, 1) if of == "clients" else ("rounds", folder, 3, n)
                found.append(peak_of(*words))
                grown = {"grown": found[-1]["peak"] / found[0]["peak"]}
                yield {"what": f"{shape}, {n} {of}", **found[-1], **(grown if n == many else {})}


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    if words[:1] == ["peak"]:
        print(json.dumps(peak(*words[1:])))
    else:
        print(json.dumps(list(measure_memory(SIZES[words[0] if words else "full"]))))


if __name__ == "__main__":
    main(sys.argv[1:])
