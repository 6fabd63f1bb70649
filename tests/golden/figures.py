"""What of a run can be compared with another: its figures, and how near they have to be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file

EXACT = 1e-9
"""Of figures that are sums in float64."""
STORED = 1e-6
"""Of an adapter, which is stored in float32, relative to its norm."""
FORWARD = 1e-3
"""Of what forward passes in float32 say: scores, and the share of a remainder that comes out."""
NARROW_FORWARD = 1e-2
"""The same in 16 bits."""
_BYTES = {"bytes", "downloaded_bytes", "uploaded_bytes"}
_FORMAT = {"schema_version"}
_SCORES = {"kept", "kept_error", "metrics"}
_ERRORS = {"error", "worst_error", "dense_error"}
"""Rounding noise of methods that are exact: only what they are held against says something."""
_LARGEST_ERROR = 2e-6
_OF_NOISE = {"worst_module", "worst_forward_module"}
"""Which module the noise is largest in is nobody's."""
_LEAST = 1e-5
"""Forward errors below it are rounding in float32."""


def directions(adapter: Path, count: int = 4) -> dict[str, list[float]]:
    """By tensor or module of a PEFT adapter: its norm, and its entries in some fixed directions.

    Returns:
        For a module, of its update ``scaling * B A (d_out, d_in)``; for others, of themselves.
    """
    config = LoraConfig.from_pretrained(adapter)
    tensors = {k: t.double() for k, t in load_file(adapter / "adapter_model.safetensors").items()}
    found = {}
    for key in sorted(tensors):
        value = tensors[key]
        if ".lora_B." in key:
            continue
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scaling = _scaling(config, name, len(value))
            value = scaling * tensors[key.replace(".lora_A.", ".lora_B.")] @ value
        picked = np.random.default_rng(len(key)).integers(-3, 4, (count, value.numel()))
        along = torch.from_numpy(picked).double() @ value.flatten()
        found[key] = [float(value.norm()), *along.tolist()]
    return found


def _scaling(config: LoraConfig, name: str, rank: int) -> float:
    fits = [a for k, a in config.alpha_pattern.items() if f".{name}".endswith(f".{k.strip('^')}")]
    alpha = fits[0] if fits else config.lora_alpha
    return float(alpha / rank ** (0.5 if config.use_rslora else 1.0))


def differences(
    found: Any, golden: Any, *, exact: float = EXACT, scores: float = FORWARD
) -> list[str]:
    """Every figure of a run that is not the golden one; bytes aside.

    Args:
        found: what :func:`tests.golden.federations.play` gives.
        golden: the same, as it was.
        exact: the largest relative difference of figures that are no noise.
        scores: that of scores, absolute where they are below 1.
    """
    faults = list(_walk(found["rounds"], golden["rounds"], "rounds", exact, scores))
    names = found["adapter"].keys() | golden["adapter"].keys()
    for name in sorted(names):
        one, other = found["adapter"].get(name), golden["adapter"].get(name)
        if not one or not other:
            faults.append(f"adapter/{name}: only in one of both")
        elif max(abs(x - y) for x, y in zip(one, other, strict=True)) > _slack(other, exact):
            faults.append(f"adapter/{name}: {one}, golden {other}")
    return faults


def bytes_moved(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every round moved; it changes with the format of messages, and with nothing else."""
    return [
        {
            "round": record["round"],
            "bytes": record["bytes"],
            "clients": {
                c["client"]: [c["downloaded_bytes"], c["uploaded_bytes"]] for c in record["clients"]
            },
        }
        for record in rounds
    ]


def _slack(golden: list[float], exact: float) -> float:
    """A direction has up to 3 sqrt(entries) times the norm in it; that of float32 is well above."""
    return max(STORED, exact) * max(map(abs, golden))


def _walk(
    found: Any, golden: Any, place: str, exact: float, scores: float, key: str = ""
) -> Iterator[str]:
    """Figures that both have: what is new, or gone, has no golden value."""
    if isinstance(golden, dict) and isinstance(found, dict):
        for name in golden.keys() & found.keys() - _BYTES - _FORMAT - _OF_NOISE:
            where = f"{place}/{name}"
            if name in _ERRORS and golden[name] <= _LARGEST_ERROR:
                if not found[name] <= _LARGEST_ERROR:
                    yield f"{where}: {found[name]!r} is above {_LARGEST_ERROR}"
                continue
            inner = key if key in _SCORES else name
            yield from _walk(found[name], golden[name], where, exact, scores, inner)
    elif isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            yield f"{place}: {len(found)} of them, golden {len(golden)}"
        for i, (x, y) in enumerate(zip(found, golden, strict=False)):
            yield from _walk(x, y, f"{place}/{i}", exact, scores, key)
    elif isinstance(golden, float) and isinstance(found, float):
        if not abs(found - golden) <= _allowed(key, golden, exact, scores):
            yield f"{place}: {found!r}, golden {golden!r}"
    elif found != golden:
        yield f"{place}: {found!r}, golden {golden!r}"


def _allowed(key: str, golden: float, exact: float, scores: float) -> float:
    if key in _SCORES:
        return scores * max(1.0, abs(golden))
    if key in ("forward", "worst_forward"):
        return max(_LEAST, 0.05 * golden)
    if key in _ERRORS:  # of a method that drops something, with the rounding of a fold in it
        return STORED * golden
    return exact * abs(golden)
