"""`examples/flat_round.py`, which shares no code with us, ends with the adapter of a run."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, logging

from fedexlora.rounds.recipe import load_recipe
from fedexlora.rounds.run import run
from tests.conftest import word_tokenizer
from tests.rounds.conftest import rows

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "flat_round.py"
QUICKSTART = ROOT / "recipes" / "quickstart.toml"


@pytest.fixture(scope="module")
def smaller(tmp_path_factory) -> list[str]:
    """What makes the quickstart one of seconds: a random BERT, and three clients with few rows."""
    folder = tmp_path_factory.mktemp("quickstart")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    word_tokenizer(special, pair=True).save_pretrained(folder / "base")
    torch.manual_seed(0)
    # So wide that the remainders of all rounds are smaller as factors, as the quickstart's are.
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 20, "vocab_size": 24, "max_position_embeddings": 64}
    BertModel(BertConfig(**shape, initializer_range=0.5)).save_pretrained(folder / "base")
    for name, count in (("train", 60), ("validation", 8)):
        made = [row | {"topic": row["label"]} for row in rows(count, len(name))]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    changes = {"model.source": folder / "base", "data.source": folder, "lora.r": 2}
    changes |= {"partition.clients": 3, "partition.min_rows": 8, "federation.rounds": 3}
    return [f"{key}={value}" for key, value in changes.items()]


@pytest.fixture
def flat(monkeypatch, capsys):
    """Runs the script in this process; returns what it printed and its exit code."""
    verbosity = logging.get_verbosity()

    def runs(*folders: Path) -> tuple[str, object]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, folders)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT))
        return capsys.readouterr().out, ended.value.code

    yield runs
    logging.set_verbosity(verbosity)


@pytest.mark.parametrize(("method", "differs"), [("fedex", False), ("fedit", True)])
def test_it_ends_with_the_adapter_of_fedex_alone(smaller, flat, tmp_path, method, differs):
    recipe = load_recipe(QUICKSTART, [*smaller, f"method.name={method}"])
    result = run(recipe, tmp_path / "run")
    shares = {client.weight for client in result.records[0].clients}
    assert len(shares) == 3, "the clients should have unequal rows"
    assert min(record.deviation for record in result.records) > 0.01
    printed, code = flat(tmp_path / "run", tmp_path / "flat")
    assert "from the run's adapter: at most" in printed
    assert code is differs, printed
