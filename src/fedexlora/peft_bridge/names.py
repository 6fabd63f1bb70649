"""PEFT's names in adapter files, and its settings that are no plain product; needs no peft."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

PREFIX = "base_model.model."
"""What PEFT puts before every name of the base model."""
PRODUCT_KEYS: Mapping[str, str] = {"A": "lora_A.weight", "B": "lora_B.weight"}
"""Below a Linear, Conv1D or convolution layer."""
EMBEDDING_KEYS: Mapping[str, str] = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
"""Below an Embedding."""
FACTOR_BIAS = "lora_B.bias"
"""A trained bias of the factors, which PEFT multiplies by the scaling too."""

INITIALISED_FROM_DATA = ("corda", "loftq", "lora_ga", "eva")
"""Initialisations that need data or a quantised copy to start from, in small letters."""
MUTATING = ("pissa", "olora")
"""Initialisations that take their first update out of the frozen weights; in small letters."""
UNSUPPORTED: Mapping[str, str] = {
    "target_parameters": "expert weights are not plain products B @ A; use target_modules",
    "layer_replication": "replicated layers share a frozen weight that the remainder changes",
    "megatron_config": "parallel layers are not supported",
    "ensure_weight_tying": "tied factors belong to two layers with remainders of their own",
}
"""Settings of ``LoraConfig`` whose updates are not those of one plain product by layer."""


def matches(patterns: Iterable[str], name: str) -> str | None:
    """The first of a configuration's patterns that PEFT applies to a module, or None."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def rank_and_scaling(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """What PEFT gives a module: its rank, and what it multiplies ``B @ A`` by.

    Args:
        config: the content of ``adapter_config.json``, complete.
        name: the module's path in the base model.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(ranks.get(matches(ranks, name), config["r"]))
    alpha = float(alphas.get(matches(alphas, name), config["lora_alpha"]))
    return rank, alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def bias_owner(name: str) -> str | None:
    """The module whose scaling multiplies a dense tensor, as biases of factors are; or None."""
    owner = name.removesuffix(f".{FACTOR_BIAS}")
    return owner if owner != name else None


def targets(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT gives a module factors, and so loads those that are stored for it."""
    if _listed(config.get("exclude_modules"), name):
        return False
    heads = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in heads):
        return False
    wanted = config.get("target_modules")
    if isinstance(wanted, str):
        return wanted.lower() == "all-linear" or re.fullmatch(wanted, name) is not None
    if name in (wanted or ()):
        return True
    return _listed(wanted, name) and _in_layers(config, name)


def _listed(wanted: str | Iterable[str] | None, name: str) -> bool:
    """Whether a pattern matches a whole name, or one of several names ends it."""
    if isinstance(wanted, str):
        return bool(wanted) and re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted or ())


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    """Whether ``layers_to_transform`` has the number of a module's layer."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    found = config.get("layers_pattern") or r"[^.]*"
    patterns = [found] if isinstance(found, str) else found
    start = r"(?:^|.*?\.)" if config.get("layers_pattern") else r".*?\."
    match = next((m for p in patterns if (m := re.match(rf"{start}{p}\.(\d+)\.", name))), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def shape_settings(ranks: Mapping[str, int], scalings: Mapping[str, float]) -> dict[str, Any]:
    """The settings of ``LoraConfig`` that give every module its rank and scaling.

    ``r`` is the largest rank, which is what servers make room for, and ``lora_alpha`` belongs to
    it; where all scalings are 1, so is ``lora_alpha / r``, for servers that know no patterns.
    """
    # "^" makes PEFT take a name for the whole path and not for the end of a longer one.
    alphas = {name: scalings[name] * rank for name, rank in ranks.items()}
    widest = max(ranks, key=lambda name: ranks[name])
    rank, alpha = ranks[widest], alphas[widest]
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": False,
        "rank_pattern": {f"^{name}": x for name, x in ranks.items() if x != rank},
        "alpha_pattern": {f"^{name}": _number(x) for name, x in alphas.items() if x != alpha},
    }


def _number(value: float) -> float:
    """PEFT writes alphas as whole numbers where they are."""
    return int(value) if value == int(value) else value
