"""Whether adapters are of one base and task and of the same layers, so that they have a mean."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedexlora.adapters.layer_names import other_names
from fedexlora.exchange.spec import TensorSpec
from fedexlora.peft_bridge.adapter_file import AdapterFile, StoredModule
from fedexlora.peft_bridge.names import FACTOR_BIAS, bias_owner

TASKS = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
"""PEFT's tasks."""
_CLASSES: Mapping[str, str] = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""The task of a model's class, by how its name ends."""
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
_SHOWN = 5


def task_of(config: Mapping[str, Any]) -> str | None:
    """The task that an adapter's settings name, by itself or by the class of its model."""
    if task := config.get("task_type"):
        return str(task)
    noted = (config.get("auto_mapping") or {}).get("base_model_class") or ""
    return next((task for end, task in _CLASSES.items() if noted.endswith(end)), None)


def base_of(config: Mapping[str, Any]) -> str | None:
    """The base that an adapter's settings name; None if they name none."""
    return str(config.get("base_model_name_or_path") or "") or None


def setting_faults(
    adapters: Sequence[AdapterFile], base: str | None, task: str | None
) -> Iterator[str]:
    """Settings that differ in what they mean; what one adapter leaves out is another's to say."""
    read = {
        "task_type": (task_of, "--task NAME") if task is None else None,
        "base_model_name_or_path": (base_of, "--base NAME") if base is None else None,
        "revision": (_revision, "--base NAME") if base is None else None,
        "trainable_token_indices": (lambda c: c.get("trainable_token_indices"), None),
    }
    for key, how in read.items():
        if how is None:
            continue
        value, option = how
        said = [(adapter, found) for adapter in adapters if (found := value(adapter.config))]
        for adapter, found in said[1:]:
            first, expected = said[0]
            if _meaning(key, found) != _meaning(key, expected):
                same = "the same model" if option == "--base NAME" else "of one task"
                way = f"; if both are {same}, say so by {option}" if option else ""
                yield (
                    f"{adapter.folder}: {key} is {found!r}, that of {first.folder} "
                    f"{expected!r}{way}"
                )


def _revision(config: Mapping[str, Any]) -> str | None:
    found = config.get("revision")
    return None if found in (None, "main") else str(found)


def _meaning(key: str, value: object) -> object:
    """What a setting says, whichever way it is written."""
    if key != "base_model_name_or_path":
        return value
    path = Path(str(value)).expanduser()
    if cached := _CACHED.search(path.as_posix()):
        return f"{cached['owner']}/{cached['name']}".casefold()
    if path.exists():
        return path.resolve()
    written = os.path.normpath(str(value))
    # The hub takes small and capital letters for the same.
    return written.casefold() if re.fullmatch(r"[^./~][^/]*/[^/]+", written) else written


def module_faults(
    adapter: AdapterFile,
    adapters: Sequence[AdapterFile],
    modules: Mapping[str, StoredModule],
    *,
    allow_missing: bool,
) -> Iterator[str]:
    """Layers that an adapter lacks, has by other names, or has in other shapes."""
    lacking = [x for x in modules if x not in adapter.modules]
    having = [other for other in adapters if other.modules.keys() & set(lacking)]
    own = [x for x in adapter.modules if any(x not in other.modules for other in having)]
    if renamed := other_names(lacking, own, modules):
        if adapter is not adapters[0]:
            theirs, mine = next(iter(renamed.items()))
            yield (
                f"{adapter.folder}: calls {mine} what others call {theirs}, and so on for "
                f"{len(renamed)} layers: the names of another version of transformers, or of a "
                f"model without its head; --base FOLDER, the base model's own, brings them together"
            )
    elif lacking and not allow_missing:
        # A layer by another name is no zero update: the option is for layers that are not there.
        way = "" if own else "; --allow-missing takes what is missing for a zero update"
        yield f"{adapter.folder}: {_listed(lacking)} not adapted, but by others{way}"
    for name, module in adapter.modules.items():
        if module.layout != modules[name].layout:
            yield (
                f"{adapter.folder}: {name} has factors {_shapes(module)}, others "
                f"{_shapes(modules[name])}"
            )


def dense_faults(adapter: AdapterFile, dense: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Heads and biases that an adapter lacks, or has in other shapes."""
    for name, spec in dense.items():
        found = adapter.dense.get(name)
        owner = bias_owner(name)
        if found is None and (owner is None or owner in adapter.modules):
            yield f"{adapter.folder}: {name} is missing, which others train"
        elif found is not None and found.shape != spec.shape:
            yield f"{adapter.folder}: {name}: {list(found.shape)}, others {list(spec.shape)}"
    if not any(name.endswith(FACTOR_BIAS) for name in dense):
        return
    if not adapter.config.get("lora_bias"):
        yield f"{adapter.folder}: lora_bias is off, but biases of factors are stored"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shapes(module: StoredModule) -> str:
    kind = "of an embedding " if module.embedding else ""
    return f"{kind}A {list(module.shapes['A'])}, B {list(module.shapes['B'])}"
