"""Processor threads of local training: one against two, on an idle machine and on a busy one.

    python benchmarks/threads.py [--turns 5] [--busy 1] [--only small] [--json FILE]

A step is a forward and a backward pass and AdamW, with LoRA of rank 4 on query and value. `small`
is the quickstart's: the shapes of MiniLM, 4 rows of 32 tokens. `large` is BERT-base, 16 rows of 128
tokens, 3.4 GB a process. Passive threads sleep while they wait for each other, others spin. Every
configuration is a process of its own, because OpenMP reads its environment once; the processes take
turns, so that what else the machine does hits all of them. A figure is the median over the turns of
a step's time against that of one thread in the same turn, and the worst turn.
`--busy` is the number of Python loops that compete, first none and then so many.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

CONFIGURATIONS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
SIZES = {
    "small": {"hidden": 384, "layers": 6, "inner": 1536, "rows": 4, "tokens": 32, "steps": 20},
    "large": {"hidden": 768, "layers": 12, "inner": 3072, "rows": 16, "tokens": 128, "steps": 1},
}


def prepare(size):
    """A model with LoRA, its optimizer and a batch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = SIZES[size]
    config = BertConfig(
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=12,
        intermediate_size=shape["inner"],
        num_labels=8,
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    model = get_peft_model(BertForSequenceClassification(config), lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, config.vocab_size, (shape["rows"], shape["tokens"]))
    labels = torch.randint(0, 8, (shape["rows"],))

    def step():
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(size):
    """Be one configuration: a line on standard input is a turn, its answer seconds a step."""
    step = prepare(size)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(SIZES[size]["steps"]):
            step()
        print((time.perf_counter() - start) / SIZES[size]["steps"], flush=True)


def start(size, environment):
    kept = {"HF_HUB_OFFLINE": "1"} | {
        name: value for name, value in os.environ.items() if name not in SETTINGS
    }
    return subprocess.Popen(
        [sys.executable, __file__, "--work", size],
        env=kept | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def competitors(count):
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def turn(worker):
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def measure(size, turns, busy):
    """Seconds a step by configuration, one for each turn."""
    workers = {name: start(size, settings) for name, settings in CONFIGURATIONS.items()}
    try:
        for worker in workers.values():
            worker.stdout.readline()
        with competitors(busy):
            taken = [{name: turn(worker) for name, worker in workers.items()} for _ in range(turns)]
        return {name: [one[name] for one in taken] for name in workers}
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()


def table(size, busy, times):
    one = times["1 thread"]
    load = f"{busy} competing loop(s)" if busy else "nothing of ours beside it"
    print(f"\n{size}, {load}, other load of the machine {os.getloadavg()[0]:.1f}")
    print("| | ms a step, median | against one thread, median | worst turn |")
    print("|---|---:|---:|---:|")
    for name, found in times.items():
        ratios = [mine / base for mine, base in zip(found, one)]
        print(
            f"| {name} | {1e3 * statistics.median(found):.0f} | {statistics.median(ratios):.2f} "
            f"| {max(ratios):.2f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1)
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=SIZES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.work)
        return
    found = []
    for size in [chosen.only] if chosen.only else SIZES:
        for busy in (0, chosen.busy):
            times = measure(size, chosen.turns, busy)
            table(size, busy, times)
            found.append({"size": size, "busy": busy, "seconds": times})
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
