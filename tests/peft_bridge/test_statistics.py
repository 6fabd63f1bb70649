"""Frozen layers with running statistics: the same function in training, and never moved."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedexlora.flower.client import initial_arrays, load_arrays
from fedexlora.peft_bridge.model import AdaptedModel


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(5, 12)
        self.norm = nn.BatchNorm1d(12)
        self.instance = nn.InstanceNorm1d(12, track_running_stats=True)
        self.outward = nn.Linear(12, 3)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.instance(self.norm(self.inward(x))[:, :, None].expand(-1, -1, 2))
        return self.outward(inner[:, :, 0])


def peft() -> nn.Module:
    torch.manual_seed(0)
    base = Normed()
    base.norm.running_mean.normal_()
    base.norm.running_var.uniform_(0.5, 2.0)
    lora = LoraConfig(r=2, lora_alpha=5, target_modules=["inward", "outward"])
    return get_peft_model(base, lora)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.named_buffers()}


def train(model: nn.Module, batches: int = 20) -> None:
    torch.manual_seed(1)
    for _ in range(batches):
        model.train()
        model(3.0 + 2.0 * torch.randn(8, 5)).square().mean().backward()


def test_training_neither_uses_nor_moves_statistics_of_the_batch():
    model = peft()
    AdaptedModel(model)
    before, x = buffers(model), torch.randn(8, 5)
    said = model.eval()(x)
    train(model)
    assert torch.equal(model.train()(x), said)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_without_it_the_same_version_would_be_another_function():
    """The test above can fail."""
    model = peft()
    x = torch.randn(8, 5)
    said = model.eval()(x)
    train(model)
    assert float((model.eval()(x) - said).norm() / said.norm()) > 0.1


def test_a_model_of_a_flower_client_is_the_same():
    server, client = peft(), peft()
    arrays = initial_arrays(server)
    load_arrays(client, arrays)
    before = buffers(client)
    train(client)
    for name, buffer in client.named_buffers():
        assert torch.equal(buffer, before[name]), name
    load_arrays(client, arrays)


def test_the_fingerprint_covers_persistent_buffers():
    def fingerprint(change: str = "") -> str:
        model = copy.deepcopy(peft())
        if change:
            model.get_base_model().get_buffer(change).add_(1)
        return AdaptedModel(model).base_fingerprint

    same = fingerprint()
    assert fingerprint() == same
    assert fingerprint("norm.running_mean") != same
    assert fingerprint("norm.num_batches_tracked") != same
    assert fingerprint("table") != same
    assert fingerprint("scratch") == same
