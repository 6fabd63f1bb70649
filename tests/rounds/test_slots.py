"""Clients that train some ranks of their adapters, chosen by an epoch that is undone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.run import run
from tests.rounds.test_run import recipe


@pytest.fixture
def decaying(document):
    """Weight decay moves what has no gradient, and two epochs are not the probe's one."""
    document["training"] |= {"weight_decay": 0.5, "num_train_epochs": 2, "optim": "adamw_torch"}
    return document


def sent(folder, round_: int) -> dict[str, dict[str, torch.Tensor]]:
    found = (folder / "updates" / f"round-{round_:04d}").iterdir()
    return {path.name: load_file(path / "adapter_model.safetensors") for path in found}


def test_ranks_that_a_client_did_not_choose_are_sent_as_they_were_received(decaying, tmp_path):
    method = {"name": "lora_a2", "local_rank": 1}
    run(recipe(decaying, method=method, rounds=2), tmp_path / "run", keep_updates=True)
    folder = RunFolder(tmp_path / "run")
    assert all(record.certificate.held for record in folder.load().records)
    before = sent(tmp_path / "run", 1)
    for tensors in before.values():
        moved = {
            (name, i)
            for name, tensor in tensors.items()
            if "lora_B" in name
            for i in range(2)
            if tensor[:, i].any()
        }
        assert len(moved) == 4, "one of two ranks of each of four modules, on average"
    shares = {client.client: client.weight for client in next(iter(folder.load().records)).clients}
    start = {
        name: sum(shares[client] * tensors[name].double() for client, tensors in before.items())
        for name in next(iter(before.values()))
    }
    for tensors in sent(tmp_path / "run", 2).values():
        moved = 0
        for name, tensor in tensors.items():
            if "lora_B" in name:
                torch.testing.assert_close(tensor.double(), start[name], rtol=1e-6, atol=1e-7)
            if "lora_A" in name:
                moved += int((tensor != next(iter(before.values()))[name]).any(1).sum())
        assert moved == 4


def test_where_all_ranks_are_chosen_it_is_rolora_to_the_bit(decaying, tmp_path):
    chosen = {"lora_a2": {"local_rank": 2}, "rolora": {}}
    weights = {}
    for name, options in chosen.items():
        parsed = recipe(decaying, method={"name": name} | options, rounds=2)
        run(parsed, tmp_path / name)
        weights[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    for name, tensor in weights["rolora"].items():
        assert torch.equal(tensor, weights["lora_a2"][name])
