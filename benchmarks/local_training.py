"""Local training beside a plain ``Trainer``, and where the time of a step goes.

A recipe's clients are trained for one round by our ``LocalClients``, as in a run, and by
transformers' ``Trainer`` alone, on a copy of the same model, with the same rows, seeds, arguments
and so the same batches; their losses are held to be equal. The two take turns, client by client, in
seconds of the processor of one thread: what else the machine does counts little and meets both.

    python benchmarks/local_training.py [--recipe recipes/quickstart.toml] [--turns 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, Trainer, logging
from transformers.trainer_callback import CallbackHandler

from fedexlora.exchange.seeds import derive_seed
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.wire import unpack
from fedexlora.local.arguments import arguments
from fedexlora.local.clients import LocalClients
from fedexlora.rounds.loop import settled_heap
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import load_recipe

INNER = ["forward", "backward", "optimizer", "clipping", "batches", "callbacks"]
INNER += ["counting operations", "collecting garbage"]
"""What is timed within ``Trainer.train``; the rest of it is the loop's own."""


class Parts:
    """Seconds of the processor by part, of everything that happens while it is told to watch."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._places = [
            (type(model), "forward", "forward"),
            (Accelerator, "backward", "backward"),
            (AcceleratedOptimizer, "step", "optimizer"),
            (AcceleratedOptimizer, "zero_grad", "optimizer"),
            (Accelerator, "clip_grad_norm_", "clipping"),
            (Trainer, "get_batch_samples", "batches"),
            (CallbackHandler, "call_event", "callbacks"),
            (Trainer, "floating_point_ops", "counting operations"),
            (Accelerator, "free_memory", "collecting garbage"),
            (Trainer, "train", "train"),
            (Trainer, "__init__", "setup"),
        ]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Time the parts within the block."""
        with ExitStack() as stack:
            for owner, name, part in self._places:
                stack.enter_context(self._timed(owner, name, part))
            start = time.process_time()
            yield
            self.seconds["all"] += time.process_time() - start

    @contextmanager
    def _timed(self, owner: type, name: str, part: str) -> Iterator[None]:
        original = getattr(owner, name)

        def timed(*words: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return original(*words, **named)
            finally:
                self.seconds[part] += time.process_time() - start

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def by_step(self, steps: int) -> dict[str, float]:
        """Milliseconds a step, which add up to ``all``."""
        ms = {part: 1e3 * seconds / steps for part, seconds in self.seconds.items()}
        found = {part: ms.get(part, 0.0) for part in INNER}
        found["the loop"] = ms["train"] - sum(found.values())
        found["making the Trainer"] = ms["setup"]
        found["around it"] = ms["all"] - ms["train"] - ms["setup"]
        return {**found, "all": ms["all"]}


class Pair:
    """One client at a time, trained by us and by a plain ``Trainer``."""

    def __init__(self, trainer: LocalClients, state: GlobalState, recipe: Any) -> None:
        self._trainer, self._state, self._recipe = trainer, state, recipe
        self.plain_model = copy.deepcopy(trainer.model.peft_model)
        self._start = [(p, p.detach().clone()) for p in self.plain_model.parameters()]

    def ours(self, client: str) -> bytes:
        """As a transport does it: enter the version, train, encode the update."""
        return self._trainer.update(client, self._state, 1, lambda *_: None)

    def plain(self, client: str) -> float:
        """A ``Trainer`` with the same arguments; its loss."""
        seed = derive_seed(self._recipe.federation.seed, 1, client)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=self.plain_model,
                args=arguments(self._recipe.training, seed=seed, folder=folder),
                train_dataset=self._trainer.rows_of(client),
                data_collator=self._trainer._job.collator,
            )
            trainer.remove_callback(PrinterCallback)
            return float(trainer.train().training_loss)

    @torch.no_grad()
    def rewind(self) -> None:
        """Give the copy its values of before."""
        for parameter, value in self._start:
            parameter.copy_(value)


def take_turns(pair: Pair, clients: Iterable[str], turns: int) -> dict[str, list[Parts]]:
    """Train every client, by us and plainly; the first turn is not counted."""
    counted: dict[str, list[Parts]] = {"ours": [], "plain": []}
    for _ in range(turns + 1):
        ours, plain = Parts(pair.plain_model), Parts(pair.plain_model)
        for client in clients:
            pair.rewind()
            with ours.watched():
                message = pair.ours(client)
            with plain.watched():
                loss = pair.plain(client)
            assert abs(unpack(message)[1]["loss"] - loss) <= 1e-6 * loss, client
        counted["ours"].append(ours)
        counted["plain"].append(plain)
    return {name: found[1:] for name, found in counted.items()}


def measure(recipe: Any, turns: int) -> dict[str, Any]:
    """Rows a second of both, and milliseconds a step by part."""
    prepared, trainer = prepare(recipe, Observer())
    state = prepared.model.initial_state(prepared.specs, recipe.federation.seed)
    pair, clients = Pair(trainer, state, recipe), trainer.num_examples
    with settled_heap():  # as in a run: `Trainer` collects garbage whenever it ends
        counted = take_turns(pair, clients, turns)
    rows = sum(clients.values())
    size = arguments(recipe.training, seed=0, folder="").train_batch_size
    steps = sum(-(-n // size) for n in clients.values())
    seconds = {name: [x.seconds["all"] for x in found] for name, found in counted.items()}
    return {
        "rows": rows,
        "batch": size,
        "turns": turns,
        "rows_a_second": {name: rows / statistics.median(x) for name, x in seconds.items()},
        "share": statistics.median(y / x for x, y in zip(seconds["ours"], seconds["plain"])),
        "ms_a_step": {name: mean([x.by_step(steps) for x in f]) for name, f in counted.items()},
    }


def mean(turns: list[dict[str, float]]) -> dict[str, float]:
    """By part, of all turns."""
    return {part: statistics.fmean(turn[part] for turn in turns) for part in turns[0]}


def table(found: dict[str, Any]) -> Table:
    """What was measured, for people."""
    rates = found["rows_a_second"]
    title = (
        f"{rates['ours']:.1f} rows a second, a plain Trainer {rates['plain']:.1f}: "
        f"{found['share']:.1%} of it (hold: 95%)"
    )
    made = Table("a step's", "ours ms", "plain ms", "of ours", title=title)
    ours, plain = found["ms_a_step"]["ours"], found["ms_a_step"]["plain"]
    for part in ours:
        share = f"{ours[part] / ours['all']:.1%}"
        made.add_row(part, f"{ours[part]:.2f}", f"{plain[part]:.2f}", share)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.toml"))
    parser.add_argument("--set", action="append", default=[], help="table.key=value")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every number there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found = measure(load_recipe(chosen.recipe, chosen.set), chosen.turns)
    Console(width=None if sys.stdout.isatty() else 100).print(table(found))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
