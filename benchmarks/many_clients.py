"""What many clients cost on one machine: memory, time beside local training, registration.

The quickstart's sentence model (MiniLM, LoRA on query and value), on the standard library's
documentation strings, repeated until every client has rows of its own. Every configuration runs
in a process of its own; its memory is what the system reports as that process's peak.

    python benchmarks/many_clients.py [--parts memory,share,registered] [--json FILE]

memory      peak of 10 clients (10 a round) and of 1,000 (20 a round); of 1 client and of 100, all
            of which take part in every round
share       the share of a round that is neither local training nor evaluation. Local training is
            what the clients' job takes; the round ends when its step is on the disk, and
            the first one, which warms up, is not counted
registered  a round of 20 clients and of its step, among 1,000 and among 50,000 registered
            ones; they answer at once, with random factors
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
VALIDATION_ROWS = 64
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="memory,share,registered")
    parser.add_argument("--rows", type=int, default=64, help="of a client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every number there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        what = json.loads(chosen.one)
        print(json.dumps((trained if what["rows"] else registered)(what)))
        return
    found = []
    for task in tasks(chosen.parts.split(","), chosen.rows, chosen.rounds):
        found.append(task | alone(task))
        if chosen.json:
            chosen.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    for line in table(found):
        print(line)


def tasks(parts: list[str], rows: int, rounds: int) -> list[dict]:
    """Every configuration of the chosen parts."""
    wanted = []
    if {"memory", "share"} & set(parts):
        wanted.append(("1,000 clients", 1000, 20, rows, rounds))
    if "memory" in parts:
        wanted += [("1 of 1", 1, 1, BATCH, rounds), ("10 clients", 10, 10, rows, rounds)]
        wanted.append(("100 of 100", 100, 100, BATCH, rounds))
    if "share" in parts:
        wanted.append(("1,000 tiny clients", 1000, 20, BATCH, rounds))
    if "registered" in parts:
        wanted += [(f"{count:,} registered", count, 20, 0, 12) for count in (1000, 50_000)]
    keys = ("name", "clients", "a_round", "rows", "rounds")
    return [dict(zip(keys, values)) for values in wanted]


def alone(task: dict) -> dict:
    """One configuration in a process of its own, with a cache of data sets of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--one", json.dumps(task | {"folder": folder})]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
    print(f"done: {task['name']}", file=sys.stderr, flush=True)
    return result


def trained(task: dict) -> dict:
    """A real run: peak memory, and where the time of its rounds went."""
    from fedexlora.local.trainer import TrainerJob
    from fedexlora.rounds.observer import Observer
    from fedexlora.rounds.recipe import parse_recipe
    from fedexlora.rounds.run import run

    folder = Path(task["folder"])
    labels = write_rows(folder / "data", task["clients"] * task["rows"])
    local, ended, started = [0.0], [], []
    train = TrainerJob.train

    def timed(*args, **options):
        begun = time.perf_counter()
        try:
            return train(*args, **options)
        finally:
            local[-1] += time.perf_counter() - begun

    class Watch(Observer):
        def started(self, _):
            started.append((time.perf_counter(), peak()))

        def finished_round(self, _):
            ended.append(time.perf_counter())
            local.append(0.0)

    TrainerJob.train = timed
    begun = time.perf_counter()
    result = run(parse_recipe(recipe(task, labels), "benchmark"), folder / "run", observer=Watch())
    marks = [started[0][0], *ended]
    rounds = [
        {"seconds": after - before, "local": trained_, "phases": record.seconds}
        for before, after, trained_, record in zip(marks, ended, local, result.records)
    ]
    stored = max(x.stat().st_size for x in (folder / "run" / "versions").glob("step-*"))
    return {
        "peak": peak(),
        "peak_before_round_1": started[0][1],
        "start": started[0][0] - begun,
        "step": stored,
        "rounds_measured": rounds,
    }


def recipe(task: dict, labels: list[str]) -> dict:
    """The quickstart's recipe for equal shares of the rows and few validation rows."""
    document = tomllib.loads((ROOT / "recipes" / "quickstart.toml").read_text(encoding="utf-8"))
    document["data"] = {
        "source": str(Path(task["folder"]) / "data"),
        "max_validation_rows": VALIDATION_ROWS,
    }
    document["task"]["labels"] = labels  # a few rows need not have all of them
    document["partition"] = {"kind": "iid", "clients": task["clients"]}
    document["federation"] |= {"rounds": task["rounds"], "clients_per_round": task["a_round"]}
    document["training"]["per_device_train_batch_size"] = BATCH
    return document


def write_rows(folder: Path, count: int) -> list[str]:
    """The documentation strings, repeated or cut to ``count`` training rows; returns the labels."""
    example = ROOT / "examples" / "stdlib_docstrings.py"
    command = [sys.executable, str(example), str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    path = folder / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join((lines * -(-count // len(lines)))[:count]), encoding="utf-8")
    return sorted({json.loads(line)["topic"] for line in lines})


def registered(task: dict) -> dict:
    """Rounds whose clients answer at once: what is left is what the server does."""
    import torch

    from fedexlora.exchange.history import History, Holdings
    from fedexlora.exchange.update import ClientUpdate
    from fedexlora.methods import METHODS
    from fedexlora.peft_bridge.load import attach_lora, load_base
    from fedexlora.peft_bridge.model import AdaptedModel
    from fedexlora.peft_bridge.source import resolve_source
    from fedexlora.rounds.folder import RunFolder
    from fedexlora.rounds.in_process import InProcessTransport
    from fedexlora.rounds.observer import Observer
    from fedexlora.rounds.participation import Participation
    from fedexlora.rounds.round import Federation, run_round

    document = tomllib.loads((ROOT / "recipes" / "quickstart.toml").read_text(encoding="utf-8"))
    source = resolve_source(document["model"]["source"])
    base, _ = load_base(source, None, "SEQ_CLS", {"num_labels": 8, "pad_token_id": 0}, 0)
    model = AdaptedModel(attach_lora(base, document["lora"], "SEQ_CLS", 0))

    names = [f"client-{i:05d}" for i in range(task["clients"])]

    class Trainer:
        """Answers with random factors at once."""

        num_examples = dict.fromkeys(names, 64)

        def update(self, client, held, round_, _):
            generator = torch.Generator().manual_seed(1000 * round_ + int(client[-5:]))
            tensors = {
                name: 0.02 * torch.randn(spec.shape, generator=generator)
                for name, spec in model.spec.tensors().items()
            }
            said = (client, round_, held.id, 64, 1.0, model.base_fingerprint)
            return ClientUpdate(*said, tensors).encode()

    transport = InProcessTransport(Trainer())
    federation = Federation(
        method="fedex",
        rule=METHODS["fedex"].default,
        model=model,
        specs={},
        seed=0,
        transport=transport,
        participation=Participation(clients_per_round=task["a_round"]),
        evaluate=lambda _: {},
        keep=lambda *_: None,
        observer=Observer(),
    )
    folder = RunFolder(Path(task["folder"]) / "run")
    folder.store.path.mkdir(parents=True)
    state = model.initial_state()
    # Every client has taken part at some time: the most that the server ever knows of them.
    holdings = Holdings(dict.fromkeys(names, -9), History(4, folder.store))
    rounds = []
    for _ in range(task["rounds"]):
        wall, begun = time.perf_counter(), time.process_time()
        state, holdings, record = run_round(federation, state, holdings)
        folder.save(state, holdings, record)
        cpu = time.process_time() - begun
        rounds.append({"cpu": cpu, "seconds": time.perf_counter() - wall})
    stored = max(x.stat().st_size for x in folder.store.path.glob("step-*"))
    return {"peak": peak(), "step": stored, "rounds_measured": rounds}


def peak() -> int:
    """Most bytes that this process ever held; ``getrusage`` may say those of its parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def beside(result: dict, *, evaluation: bool = False) -> float:
    """The share of all rounds but the first that is not local training, nor evaluation."""
    rounds = result["rounds_measured"][1:] or result["rounds_measured"]
    local = sum(x["local"] for x in rounds)
    scored = 0.0 if evaluation else sum(x["phases"]["evaluate"] for x in rounds)
    return 1.0 - local / (sum(x["seconds"] for x in rounds) - scored)


def phases(result: dict) -> str:
    """Median seconds by phase; ``receive`` and ``save`` are what the record does not tell apart."""
    rounds = result["rounds_measured"][1:] or result["rounds_measured"]
    rows = [
        x["phases"]
        | {"local": x["local"], "receive": x["phases"]["train"] - x["local"]}
        | {"save": x["seconds"] - sum(x["phases"].values())}
        for x in rounds
    ]
    names = [name for name in rows[0] if name != "train"]
    return ", ".join(f"{n} {statistics.median(row[n] for row in rows):.3f}" for n in names)


def table(found: list[dict]) -> list[str]:
    """The measurements as lines of Markdown."""
    by_name = {result["name"]: result for result in found}
    lines = ["| | peak MB | not local training | with evaluation |", "|---|---:|---:|---:|"]
    lines += [
        f"| {r['name']}, {r['a_round']} a round, {r['rows']} rows each | {r['peak'] / 1e6:.0f} "
        f"| {beside(r):.1%} | {beside(r, evaluation=True):.1%} |"
        for r in found
        if r["rows"]
    ]
    lines += ["", "seconds of a round, and before the first:"]
    lines += [f"{r['name']}: {phases(r)}; start {r['start']:.1f}" for r in found if r["rows"]]
    for many, few in (("1,000 clients", "10 clients"), ("100 of 100", "1 of 1")):
        if many in by_name and few in by_name:
            ratio = by_name[many]["peak"] / by_name[few]["peak"]
            lines.append(f"peak memory, {many} over {few}: {ratio:.3f}")
    if "50,000 registered" in by_name:
        many, few = by_name["50,000 registered"], by_name["1,000 registered"]
        cpu = [statistics.median(x["cpu"] for x in r["rounds_measured"][1:]) for r in (many, few)]
        more = many["clients"] - few["clients"]
        ids = [(many[x] - few[x]) / more for x in ("peak", "step")]
        lines.append(
            f"50,000 registered over 1,000: peak memory {many['peak'] / few['peak']:.3f}, "
            f"processor time of a round {cpu[0] / cpu[1]:.2f} ({cpu[0]:.3f} and {cpu[1]:.3f} s); "
            f"a registered client is {ids[0]:.0f} bytes of memory and {ids[1]:.0f} of a step"
        )
    return lines


if __name__ == "__main__":
    main()
