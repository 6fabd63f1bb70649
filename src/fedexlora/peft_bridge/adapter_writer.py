"""Writes a PEFT adapter module by module, without PEFT and without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fedexlora.exchange.spec import TensorSpec
from fedexlora.exchange.tensors import TensorWriter
from fedexlora.peft_bridge.adapter_config import CONFIG, TENSORS
from fedexlora.peft_bridge.adapter_file import StoredModule
from fedexlora.peft_bridge.names import PREFIX, shape_settings

LETTERS: tuple[Literal["A"], Literal["B"]] = ("A", "B")


class AdapterWriter:
    """A new adapter whose scaling is 1 in every module, whatever its rank.

    Args:
        folder: an existing folder.
        config: settings to start from: those of an adapter of the same layers.
        modules: the adapted layers; their ranks do not matter.
        dense: heads and biases that may be added.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        modules: Mapping[str, StoredModule],
        dense: Iterable[str] = (),
    ) -> None:
        self._folder, self._config, self._modules = folder, config, modules
        self._ranks: dict[str, int] = {}
        keys = [module.key(letter) for module in modules.values() for letter in LETTERS]
        keys += [f"{PREFIX}{name}" for name in dense]
        self._tensors = TensorWriter(folder / TENSORS, keys)

    def __enter__(self) -> Self:
        self._tensors.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensors.__exit__(kind, error, trace)
        if error is None:
            settings = shape_settings(self._ranks, dict.fromkeys(self._ranks, 1.0))
            plain = {"init_lora_weights": True, "inference_mode": True}
            config = {**self._config, **settings, **plain}
            text = json.dumps(config, indent=2, sort_keys=True)
            (self._folder / CONFIG).write_text(text, encoding="utf-8")

    @property
    def rank(self) -> int:
        """The largest rank so far."""
        return max(self._ranks.values())

    def add(
        self, name: str, rank: int, rows: Callable[[Literal["A", "B"]], Iterable[Tensor]]
    ) -> None:
        """Write a module's factors, in float32.

        Args:
            name: the module.
            rank: of its factors.
            rows: groups of consecutive rows of ``A (rank, d_in)`` or ``B (d_out, rank)``, whose
                product is the update itself.
        """
        module = self._modules[name]
        # PEFT has no adapter of rank 0; a module without any update gets a zero of rank 1.
        self._ranks[name] = max(rank, 1)
        for letter in LETTERS:
            spec = TensorSpec(module.stored_shape(letter, max(rank, 1)), torch.float32)
            groups = rows(letter) if rank else [torch.zeros(spec.shape)]
            self._tensors.add_pieces(module.key(letter), spec, groups)

    def add_dense(self, name: str, spec: TensorSpec, rows: Iterable[Tensor]) -> None:
        """Write a head or bias from consecutive groups of its rows."""
        self._tensors.add_pieces(f"{PREFIX}{name}", spec, rows)
