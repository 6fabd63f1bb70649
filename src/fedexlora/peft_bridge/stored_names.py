"""Names of tensors as other programs wrote them, brought to those of PEFT's adapter files.

PEFT stores ``base_model.model.LAYER.lora_A.weight``. Files made from a live model's ``state_dict``
have more in a name: the adapter's own, and what compilers and parallel wrappers put in. PEFT
ignores every tensor whose name differs, without an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from fedexlora.peft_bridge.names import PREFIX

_WRAPPERS: Mapping[str, str] = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "_dp_module": "data parallelism",
}
"""Parts of names that wrappers add, and who does; no layer of a model is called so."""
_NAMED = (
    re.compile(r"(?P<start>.*\.lora_[AB])\.(?P<adapter>[^.]+)(?P<end>\.(?:weight|bias))$"),
    re.compile(r"(?P<start>.*\.lora_embedding_[AB])\.(?P<adapter>[^.]+)(?P<end>)$"),
    re.compile(r"(?P<start>.*\.trainable_tokens_delta)\.(?P<adapter>[^.]+)(?P<end>)$"),
)
"""Live names, which hold the name of the adapter."""
_HEAD = re.compile(r"(?P<start>.*)\.modules_to_save\.(?P<rest>.+)$")
_FROZEN = re.compile(r"(?P<start>.*)\.original_module\.(?P<rest>.+)$")


@dataclass(slots=True)
class StoredNames:
    """The tensors of a file by PEFT's names, what was done to get there, and what is wrong."""

    keys: dict[str, str]
    """The name in the file of every tensor, by its name as PEFT stores it."""
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def rename(self, change: Callable[[str], str], note: str) -> None:
        """Change names; says ``note`` with the number of those that were changed."""
        found: dict[str, str] = {}
        changed = 0
        for name, key in self.keys.items():
            new = change(name)
            changed += new != name
            if new in found:
                self.faults.append(f"{key} and {found[new]} are both the tensor {new}")
            found[new] = key
        self.keys = found
        if changed:
            self.notes.append(f"{note} in {changed} of {len(found)} names")


def stored_names(keys: Iterable[str]) -> StoredNames:
    """Bring a file's names to those that PEFT stores and loads.

    Every note and every fault is one line for all tensors of a kind.

    >>> stored_names(["_orig_mod.base_model.model.fc.lora_A.default.weight"]).keys
    {'base_model.model.fc.lora_A.weight': '_orig_mod.base_model.model.fc.lora_A.default.weight'}
    """
    names = StoredNames({key: key for key in keys})
    for part, whose in _WRAPPERS.items():
        names.rename(partial(_without, part), f"took {part}. of {whose} out")
    _bare_lead(names)
    adapters = _adapter_names(names)
    _heads(names, adapters)
    return names


def _without(part: str, name: str) -> str:
    return ".".join(x for x in name.split(".") if x != part)


def _bare_lead(names: StoredNames) -> None:
    """Leave exactly one ``base_model.model.`` at the start of every name."""
    leads = {name.partition(PREFIX)[0] for name in names.keys}
    outside = [x for x in names.keys if PREFIX not in x]
    if outside:
        names.faults.append(
            f"{len(outside)} of {len(names.keys)} tensors, {outside[0]} the first: expected a name "
            f"that starts with {PREFIX}; PEFT would ignore it. Store the adapter again by PEFT's "
            f"save_pretrained, or put the missing part before each name"
        )
        names.keys = {name: key for name, key in names.keys.items() if PREFIX in name}
        return
    if len(leads) > 1:
        listed = ", ".join(repr(x) for x in sorted(leads))
        names.faults.append(f"names with different starts before {PREFIX}: {listed}")
        return
    lead = leads.pop() if leads else ""
    names.rename(lambda name: name.removeprefix(lead), f"took the leading {lead} out")
    doubled = re.compile(rf"(?:{re.escape(PREFIX)})+")
    names.rename(lambda name: doubled.sub(PREFIX, name, count=1), f"took a second {PREFIX} out")
    inner = f"{PREFIX}module."
    if names.keys and all(name.startswith(inner) for name in names.keys):
        names.rename(
            lambda name: PREFIX + name.removeprefix(inner),
            "took module. of data parallelism out",
        )


def _adapter_names(names: StoredNames) -> set[str]:
    """Take the adapter's own name out of live names; returns it, if there is one."""
    found = {
        match["adapter"]
        for name in names.keys
        for pattern in _NAMED
        if (match := pattern.match(name))
    }
    if len(found) > 1:
        names.faults.append(
            f"{len(found)} adapters in one file ({', '.join(sorted(found))}), where PEFT reads "
            f"one: store each by itself, model.save_pretrained(DIR, selected_adapters=[NAME])"
        )
        names.keys = {
            name: key
            for name, key in names.keys.items()
            if not any(pattern.match(name) for pattern in _NAMED)
        }
        return found
    for adapter in found:
        names.rename(_plain, f"took the adapter's name, {adapter}., out")
    return found


def _plain(name: str) -> str:
    for pattern in _NAMED:
        if match := pattern.match(name):
            return f"{match['start']}{match['end']}"
    return name


def _heads(names: StoredNames, adapters: set[str]) -> None:
    """Give trained heads their stored names, and leave out the frozen copies beside them."""
    wanted = adapters or {"default"}

    def plain(name: str) -> str:
        match = _HEAD.match(name)
        if match is None:
            return name
        first, dot, rest = match["rest"].partition(".")
        return f"{match['start']}.{rest if dot and first in wanted else match['rest']}"

    names.rename(plain, "took modules_to_save. of PEFT's live model out")
    frozen = [name for name in names.keys if _FROZEN.match(name)]
    lone = [name for name in frozen if _trained(name) not in names.keys]
    if lone:
        names.faults.append(
            f"{len(lone)} tensors of original_module, {lone[0]} the first, are frozen copies whose "
            f"trained ones are missing"
        )
    if frozen:
        names.keys = {n: key for n, key in names.keys.items() if n not in set(frozen)}
        names.notes.append(
            f"left out {len(frozen)} frozen copies (original_module) of trained heads, which PEFT "
            f"does not store"
        )


def _trained(name: str) -> str:
    match = _FROZEN.match(name)
    return f"{match['start']}.{match['rest']}" if match else name
