"""Records of runs that never ran: cheap, of any size, and with whatever text a test is about."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tomlkit

from fedexlora.exchange.records import (
    BytesRecord,
    CertificateRecord,
    ClientRecord,
    LeftOutRecord,
    ModuleRecord,
    RoundRecord,
)

CLIENTS = ("site-north", "site-south", "site-west")
EXACT = {"fedex", "ffa"}


def write_run(
    folder: Path,
    method: str = "fedex",
    *,
    seed: int = 0,
    rounds: int = 3,
    layers: int = 2,
    recipe: dict[str, Any] | None = None,
    header: dict[str, Any] | None = None,
    clients: tuple[str, ...] = CLIENTS,
    norms: bool = True,
    planned: int | None = None,
) -> Path:
    """Write the three files that a report reads."""
    folder.mkdir(parents=True)
    document = {
        "model": {"source": "tiny-bert"},
        "task": {"kind": "classification"},
        "data": {"source": "data/rows"},
        "partition": {"kind": "iid", "clients": len(clients)},
        "lora": {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"]},
        "training": {"learning_rate": 0.01},
        "federation": {"method": method, "rounds": planned or rounds, "seed": seed},
    }
    for table, values in (recipe or {}).items():
        document.setdefault(table, {}).update(values)
    (folder / "recipe.toml").write_text(tomlkit.dumps(document), encoding="utf-8")
    said = {
        "fedexlora": "0.1.0",
        "packages": {"torch": "2.9.0", "peft": "0.20.0"},
        "machine": {"python": "3.11.7", "system": "Linux", "device": "cpu", "cores": 2},
        "data": "d" * 64,
        "base": "b" * 16,
        "precision": "float32",
        "clients": dict.fromkeys(clients, 12),
        "validation_rows": 16,
        "headline": "accuracy",
        "initial_metrics": {"accuracy": 0.5, "loss": 0.7},
        "weights": dict.fromkeys(modules(layers), 3.0) if norms else {},
        **(header or {}),
    }
    (folder / "run.json").write_text(json.dumps(said), encoding="utf-8")
    records = [record(method, seed, i + 1, layers, clients, norms) for i in range(rounds)]
    lines = "".join(f"{x.model_dump_json()}\n" for x in records)
    (folder / "rounds.jsonl").write_text(lines, encoding="utf-8")
    return folder


def modules(layers: int) -> list[str]:
    return [
        f"encoder.layer.{i}.attention.{name}" for i in range(layers) for name in ("query", "value")
    ]


def record(
    method: str, seed: int, round_: int, layers: int, clients: tuple[str, ...], norms: bool = True
) -> RoundRecord:
    """One round; the numbers depend on the arguments alone."""
    draw = random.Random(f"{method} {seed} {round_}")
    error = 3e-7 if method in EXACT else 0.2 + 0.01 * round_
    found = tuple(_module(name, draw, error, round_, norms) for name in modules(layers))
    worst = max(found, key=lambda m: m.error)
    out = clients[-1] if round_ == 2 else None
    return RoundRecord(
        round=round_,
        registered=len(clients),
        method=method,
        clients=tuple(_client(name, len(clients), draw) for name in clients if name != out),
        left_out=(
            LeftOutRecord(
                client=out, reasons=("it was too late",), since=1, downloaded_bytes=9,
                uploaded_bytes=0,
            ),
        ) if out else (),
        stay=0.0,
        bytes=BytesRecord(up=9000, down=12000 + 5000 * (round_ > 1)),
        deviation=0.6 / round_,
        certificate=CertificateRecord(
            placement="fold", error=error, bound=error, allowed=1.5e-6, truncated=0.0,
            worst_module=worst.module, worst_error=worst.error, forward=error,
            worst_forward_module=worst.module, worst_forward=2 * error, kept=0.9999,
            kept_error=1e-6, dense_error=0.0, own=(), held=method in EXACT,
        ),
        modules=found,
        metrics={"accuracy": 0.5 + 0.1 * round_ + 0.01 * draw.random(), "loss": 0.7 / round_},
        seconds={"train": 2.0, "evaluate": 0.5, "certify": 0.01},
    )  # fmt: skip


def _module(name: str, draw: random.Random, error: float, round_: int, norms: bool) -> ModuleRecord:
    more = {"mean_product": 1 + draw.random(), "remainder_norm": 0.1 * round_, "bf16_loss": 0.3}
    return ModuleRecord(
        module=name, ideal=2.0, error=error * (1 + draw.random()), bound=2 * error, allowed=1.5e-6,
        forward=error, kept=0.9999, kept_error=1e-6, deviation=(0.4 + 0.3 * draw.random()) / round_,
        truncated=0.0, placement="fold", remainder=f"rank {4 * round_}", **(more if norms else {}),
    )  # fmt: skip


def _client(name: str, count: int, draw: random.Random) -> ClientRecord:
    return ClientRecord(
        client=name, num_examples=12, weight=1 / count, loss=0.5 + draw.random(), counted=1.0,
        norm=None, staleness=0, since=None, downloaded_bytes=4000, uploaded_bytes=3000, seconds=0.6,
    )  # fmt: skip
