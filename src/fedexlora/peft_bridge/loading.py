"""What PEFT does with a stored adapter when it loads it, tried without any numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers.modeling_utils import PreTrainedModel

from fedexlora.exchange.tensors import TensorFile
from fedexlora.peft_bridge.adapter_config import TENSORS

_SHOWN = 5


def loading_faults(model: PreTrainedModel, folder: Path) -> list[str]:
    """Why PEFT would not load all of an adapter; one line each, and none if it would.

    Args:
        model: the base, on the meta device; changed, so that it is of no use afterwards.
        folder: the adapter, stored by PEFT's names.
    """
    tensors = TensorFile.open(folder / TENSORS).tensors
    empty = {
        key: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for key, spec in tensors.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig.from_pretrained(str(folder))
            live = get_peft_model(model, config, low_cpu_mem_usage=True)
            found = set_peft_model_state_dict(live, empty, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        return [
            f"{type(model).__name__}: PEFT cannot load it: {' '.join(str(error).split())[:600]}"
        ]
    ignored = list(found.unexpected_keys)
    more = f" and {len(ignored) - _SHOWN} more" if len(ignored) > _SHOWN else ""
    return [f"PEFT would ignore {', '.join(ignored[:_SHOWN])}{more}"] if ignored else []
