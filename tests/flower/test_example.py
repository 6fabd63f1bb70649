"""The example app under Flower's own ``flwr run``, in a SuperLink that the test starts and ends."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

from tests.flower.superlink import ROOT, flwr_run

pytest.importorskip("flwr")
pytest.importorskip("ray")

ROUNDS = 2


@pytest.fixture
def model_folder(bert, tmp_path):
    """A classifier whose file has all weights, so that every process loads the same base."""
    folder = tmp_path / "model"
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(bert, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_example_runs_in_flowers_simulation(model_folder, tmp_path):
    adapter = tmp_path / "adapter"
    config = f"model-name='{model_folder}' save-path='{adapter}' num-server-rounds={ROUNDS}"
    log = flwr_run(ROOT / "examples" / "flower_strategy", tmp_path / "flower", "-c", config)
    assert log.count("2 of 2 nodes count") == ROUNDS, log
    assert "left out" not in log, log

    base = BertForSequenceClassification.from_pretrained(model_folder)
    loaded = PeftModel.from_pretrained(base, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    ranks = {name: t.shape[0] for name, t in weights.items() if name.endswith("lora_A.weight")}
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"
    assert max(ranks.values()) > 4, "the remainders of two clients are part of the adapter"
