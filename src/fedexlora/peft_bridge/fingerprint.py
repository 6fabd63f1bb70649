"""A short name of a base model's weights, cheap enough for billions of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from itertools import chain

import torch
from peft import PeftModel
from torch import Tensor

from fedexlora.peft_bridge.inspect import base_name, is_frozen_base
from fedexlora.peft_bridge.statistics import frozen_buffers
from fedexlora.peft_bridge.weights import precision

_SAMPLES = 512


def base_fingerprint(model: PeftModel, adapter: str, dense: Iterable[str]) -> str:
    """The :func:`fingerprint` of a model's frozen base, its buffers included.

    Args:
        model: the PEFT model, before any remainder is folded.
        adapter: its adapter, which is not part of the base.
        dense: trained parameters, which are not either.
    """
    trained = set(dense)
    weights = (
        (base_name(path), parameter)
        for path, parameter in model.named_parameters()
        if is_frozen_base(path, adapter) and base_name(path) not in trained
    )
    return fingerprint(chain(weights, frozen_buffers(model, adapter)))


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Say which weights these are: one pass at memory speed, wherever they lie.

    Every weight counts by the sum of its bits as integers, which notices any single change, and by
    a sample of its entries in their order.

    Args:
        weights: names and tensors; the order does not matter.

    Returns:
        For people and for comparison: number of entries, most common precision and a digest.
    """
    digest, count, kinds = hashlib.sha256(), 0, Counter[str]()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        content = weight.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {list(weight.shape)} {precision(weight)} ".encode())
        digest.update(f"{_bit_sum(content)} ".encode())
        entries = content.reshape(-1, weight.element_size())
        step = max(1, len(entries) // _SAMPLES)
        digest.update(entries[::step].cpu().contiguous().numpy().data)
        count += weight.numel()
        kinds[precision(weight)] += weight.numel()
    kind = kinds.most_common(1)[0][0] if kinds else "none"
    return f"{count} entries in {kind}, {digest.hexdigest()[:16]}"


def _bit_sum(content: Tensor) -> int:
    """The sum of bytes, eight at a time, modulo 2**64: sums of narrower integers are not fast."""
    if content.storage_offset() % 8:
        content = content.clone()
    whole = len(content) // 8 * 8
    return int(content[:whole].view(torch.int64).sum()) + int(content[whole:].sum())
