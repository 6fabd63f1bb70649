"""Which options of training and of LoRA a server may set, and which texts they may hold.

Numbers, names, and patterns of names that are matched in bounded time; no paths, no hosts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import comb, prod
from typing import Any

from fedexlora.exchange.untrusted import short

TABLES = frozenset(
    {
        "model",
        "task",
        "partition",
        "lora",
        "training",
        "method",
        "federation",
        "evaluation",
        "clients",
    }
)
"""Tables of a recipe that a server may send."""
TRAINING_OPTIONS = frozenset(
    {
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "bf16",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "label_smoothing_factor",
        "learning_rate",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_steps",
        "num_train_epochs",
        "optim",
        "optim_args",
        "per_device_train_batch_size",
        "schedule",
        "train_sampling_strategy",
        "use_cpu",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
    }
)
"""Keys of ``[training]`` that a server may set: numbers and names, no paths, hosts or devices."""
LORA_OPTIONS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "modules_to_save",
        "r",
        "rank_pattern",
        "target_modules",
        "trainable_token_indices",
        "use_rslora",
    }
)
"""Fields of ``LoraConfig`` that a server may set."""
_LINES_ALLOWED = frozenset({"task.prompt_template", "task.completion_template"})
_LONGEST_TEXT = 10_000
_LONGEST_PATTERN = 1000
_WORD = re.compile(r"[\w.,=:+ -]{0,200}", re.ASCII)
"""A text of ``[training]``: a name, or options of an optimiser."""
_LONGEST_NAME = 128
"""Of a module, in letters, for what a pattern may cost."""
_MOST_TEXTS = 2048
"""Of ``[lora]``: each may be matched against every module."""
_MOST_PATHS = 2e7
"""Ways to match one name that a pattern may have: seconds for a large model."""
_GROUP = re.compile(r"\((?!\?)|\(\?:|\)|\|")


def text_faults(value: object, key: str = "") -> Iterator[str]:
    """Texts of a recipe that are too long, or hold control characters; a prompt may have lines."""
    if isinstance(value, str):
        shown = value.translate({9: None, 10: None}) if key in _LINES_ALLOWED else value
        if len(value) > _LONGEST_TEXT or not shown.isprintable():
            yield f"{short(key)}: expected at most {_LONGEST_TEXT} printable characters"
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from text_faults(name, "a key")
            yield from text_faults(inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            yield from text_faults(inner, key)


def option_faults(document: Mapping[str, Any]) -> list[str]:
    """Options of ``[training]``, ``[lora]`` and ``[clients]`` that a server may not set."""
    given = {"training": TRAINING_OPTIONS, "lora": LORA_OPTIONS}
    faults = [
        f"{table}.{short(key)}: a server may not set it"
        for table, allowed in given.items()
        for key in document[table]
        if key not in allowed
    ]
    faults += [
        f"training.{short(key)}: expected a number or a name, found {short(text)}"
        for key, value in document["training"].items()
        for text in _texts(value)
        if not _WORD.fullmatch(text)
    ]
    patterns = [text for table in ("lora", "clients") for text in _texts(document[table])]
    if len(patterns) > _MOST_TEXTS:
        return [*faults, f"lora: expected at most {_MOST_TEXTS} names, found {len(patterns)}"]
    return faults + [
        f"lora: {short(text)} is no name or pattern of modules that a server may give"
        for text in patterns
        if not is_plain_pattern(text)
    ]


def is_plain_pattern(text: str) -> bool:
    """Whether a regular expression, on the name of a module, ends soon.

    Repeated groups, references and assertions are none; what is left has at most as many ways to
    match as its repetitions have ends, times its alternatives.

    >>> is_plain_pattern(".*[.](q|v)_proj"), is_plain_pattern("(a+)+$")
    (True, False)
    """
    if len(text) > _LONGEST_PATTERN or re.search(r"\\[0-9]|\(\?[^:]|\)[*+{]", text):
        return False
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "x", re.sub(r"\\.", "x", text))
    repeated, optional = len(re.findall(r"[*+{]", bare)), bare.count("?")
    ends = comb(_LONGEST_NAME + repeated, repeated)
    return (ends << optional) * _alternatives(bare) <= _MOST_PATHS


def _alternatives(pattern: str) -> int:
    """The product of the numbers of alternatives of all groups."""
    counts, open_ = [1], [0]
    for found in _GROUP.findall(pattern):
        if found == "|":
            counts[open_[-1]] += 1
        elif found == ")":
            open_.pop()
        else:
            open_.append(len(counts))
            counts.append(1)
    return prod(counts)


def _texts(value: object) -> Iterator[str]:
    """All texts of a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
