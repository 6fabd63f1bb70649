"""A whole run that takes seconds: a tiny BERT, three clients, words that tell their label."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run


def rows(count: int, seed: int) -> list[dict[str, object]]:
    """Texts of label ``x`` have words 0 to 9, those of label ``y`` words 10 to 19."""
    generator = random.Random(seed)
    made = []
    for i in range(count):
        label = "xy"[i % 2]
        words = [
            f"w{generator.randrange(10) + 10 * (label == 'y')}"
            for _ in range(generator.randint(2, 9))
        ]
        site = generator.choice(["Site North", "site/south", "Site West"])
        made.append({"text": " ".join(words), "label": label, "site": site})
    return made


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows"))


def save_rows(folder: Path) -> Path:
    """Write 36 training and 16 validation rows."""
    for name, count in (("train", 36), ("validation", 16)):
        lines = "\n".join(map(json.dumps, rows(count, len(name))))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def recipe_document(bert: str, data_folder: Path) -> dict:
    return {
        "model": {"source": bert},
        "task": {"kind": "classification", "text": "text", "metrics": ["accuracy", "f1"]},
        "data": {"source": str(data_folder)},
        "partition": {"kind": "by_column", "column": "site"},
        "method": {"name": "fedex"},
        "federation": {"rounds": 3, "seed": 4},
        "lora": {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"]}
        | {"modules_to_save": ["pooler"]},
        "training": {"learning_rate": 3e-2, "per_device_train_batch_size": 8, "use_cpu": True},
    }


@pytest.fixture
def document(bert, data_folder) -> dict:
    """A recipe as a TOML parser gives it; tests change what they are about."""
    return recipe_document(bert, data_folder)


@pytest.fixture(scope="session")
def whole(bert, data_folder, tmp_path_factory) -> Path:
    """The folder of that recipe's run, never interrupted; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(parse_recipe(recipe_document(bert, data_folder), "whole"), out, keep_updates=True)
    return out


def files(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records_without_times(folder: Path) -> list[dict]:
    """The records of a run's folder but for their times."""
    return [without_times(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def without_times(line: str) -> dict:
    """A record but for its times."""

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key != "seconds"}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    return strip(json.loads(line))
