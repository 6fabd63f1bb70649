"""Adapters as other people would have stored them: by PEFT itself, with random factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from tests.models import adapted, base_of, lora_layers


def fill(model: PeftModel, seed: int) -> None:
    """Random factors, heads and biases: everything that an adapter stores."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.2 * noise + (0.0 if "lora_" in name else parameter.data))


def store(
    folder: Path, case: str, seed: int, dtype: torch.dtype | None = None, **changes: object
) -> Path:
    """One adapter of a case, stored by PEFT on a base named ``base``."""
    model = adapted(case, **changes)
    fill(model, seed)
    if dtype:
        model.to(dtype)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def store_all(
    root: Path, case: str, variants: Sequence[Mapping[str, object]], **more: object
) -> list[Path]:
    """One adapter for each of the changes to a case."""
    return [
        store(root / f"site-{i}", case, seed=i, **{**more, **changes})
        for i, changes in enumerate(variants, 1)
    ]


def load(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The adapter on the untouched base, as a user loads it."""
    return PeftModel.from_pretrained(base_of(case), str(folder)).to(dtype)


def updates(case: str, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT says that every layer's weight gains, in float64 arithmetic."""
    model = load(case, folder, torch.float64)
    with torch.no_grad():
        return {name: layer.get_delta_weight("default") for name, layer in lora_layers(model)}


def ideal(case: str, folders: Sequence[Path], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The naive weighted mean of all adapters' updates, in float64."""
    total = float(sum(weights))
    found: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, update in updates(case, folder).items():
            found[name] = found.get(name, 0.0) + (weight / total) * update
    return found
