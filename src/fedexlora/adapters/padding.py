"""One rank in all layers, for servers that read a layer's rank off its tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedexlora.exchange.tensors import pieces
from fedexlora.peft_bridge.adapter_config import CONFIG, TENSORS
from fedexlora.peft_bridge.adapter_file import AdapterFile, open_adapter
from fedexlora.peft_bridge.adapter_writer import AdapterWriter


def pad_to_one_rank(folder: Path, rank: int) -> None:
    """Give every layer of an adapter the same rank, by zeros; its updates stay as they are.

    llama.cpp multiplies ``B @ A`` by ``lora_alpha`` over the rank of that layer's tensor and knows
    no ``alpha_pattern``: where ranks differ, layers of a lower one come out too large.

    Args:
        folder: an adapter whose scaling is 1 in every layer; written anew.
        rank: the largest rank of its layers.
    """
    before = folder / f"narrow-{TENSORS}"
    adapter = open_adapter(folder)
    (folder / TENSORS).rename(before)
    narrow = adapter.moved(before)
    with AdapterWriter(folder, adapter.config, adapter.modules, adapter.dense) as writer:
        for name in adapter.modules:
            writer.add(name, rank, partial(_padded, narrow, name, rank))
        for name, spec in adapter.dense.items():
            writer.add_dense(name, spec, (narrow.dense_rows(name, *part) for part in pieces(spec)))
    before.unlink()
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if settings["rank_pattern"] or settings["alpha_pattern"]:
        raise AssertionError(f"{folder}: layers of several ranks are left")


def _padded(
    adapter: AdapterFile, name: str, rank: int, letter: Literal["A", "B"]
) -> Iterator[Tensor]:
    factor = adapter.factor(name, letter)
    short = rank - adapter.modules[name].rank
    if letter == "A":
        yield torch.cat([factor, factor.new_zeros(short, factor.shape[1])])
    else:
        yield torch.cat([factor, factor.new_zeros(factor.shape[0], short)], dim=1)
