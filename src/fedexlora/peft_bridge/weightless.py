"""A base model without weights: its layers, shapes and dtypes, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.hub import cached_file

from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.arithmetic import Width
from fedexlora.peft_bridge.load import HEADS, Quantization, check_bitsandbytes, quantization_fields

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What transformers loads a model from, where it is one file."""


def weightless_base(
    source: str,
    revision: str | None,
    task_type: str,
    config: Mapping[str, Any],
    *,
    dtype: Width = "float32",
    quantization: Quantization | None = None,
    unquantised: Iterable[str] = (),
) -> PreTrainedModel:
    """What ``load_base`` would load, on torch's meta device; its arguments.

    Raises:
        BridgeError: if there is no such model, or bitsandbytes is needed and not installed.
    """
    if quantization:
        check_bitsandbytes(quantization)
    try:
        known = AutoConfig.from_pretrained(source, revision=revision, **config)
        with torch.device("meta"):
            model: PreTrainedModel = HEADS[task_type].from_config(
                known, dtype=getattr(torch, dtype)
            )
            if quantization:
                fields = quantization_fields(quantization, dtype, unquantised)
                quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**fields))
                quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    except (OSError, ValueError) as error:
        raise BridgeError(f"model.source {source!r} cannot be loaded: {error}") from error
    return model


def weight_files(source: str, revision: str | None) -> list[Path]:
    """The files that a base's weights are in, if all are on this machine; nothing is downloaded.

    Args:
        source: a folder or hub name, as ``resolve_source`` returns it.
        revision: a hub revision; None for the default.
    """
    for name in _WEIGHTS:
        if whole := _here(source, revision, [name]):
            return whole
        if index := _here(source, revision, [f"{name}.index.json"]):
            try:
                shards = set(
                    json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values()
                )
            except (OSError, ValueError, KeyError, AttributeError):
                return index  # whoever loads it says what is wrong
            return _here(source, revision, sorted(shards))
    return []


def stored_bytes(parameter: torch.Tensor) -> int:
    """What a parameter takes where it is loaded, also where it has no numbers yet.

    Four-bit weights are in blocks of 64 with one float32 each, eight-bit ones have one a row.
    """
    kind, count = type(parameter).__name__, parameter.numel()
    if kind == "Params4bit":
        return count // 2 + 4 * -(-count // 64)
    if kind == "Int8Params":
        return count + 4 * parameter.shape[0]
    return count * parameter.element_size()


def _here(source: str, revision: str | None, names: list[str]) -> list[Path]:
    """The files of these names; none if one is missing."""
    found = [
        cached_file(
            source,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        for name in names
    ]
    return [Path(path) for path in found if path] if all(found) else []
