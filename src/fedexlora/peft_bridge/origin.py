"""Where a run begins: what a server without a model needs to know of the model that nodes hold.

Nodes load the model, and with it version 0: the base, the layers that are adapted, new factors by
the run's seed, heads. They state the digests of all that, agree, and one of them sends it. Nothing
here needs PEFT or a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.digest import known_digest, tensors_digest, text_digest
from fedexlora.exchange.layout import (
    adapter_tensors,
    dense_from,
    dense_tensors,
    refuse_others,
    unpack_finite,
)
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec, TensorSpec
from fedexlora.exchange.state import GlobalState, adapter_from
from fedexlora.exchange.untrusted import LARGEST, number, short, tensor_names
from fedexlora.exchange.version import Adapter, adapter_digest, first_id
from fedexlora.exchange.wire import pack
from fedexlora.peft_bridge.adapter_config import config_faults
from fedexlora.peft_bridge.adapter_layout import AdapterLayout, stored_module
from fedexlora.peft_bridge.names import MUTATING, PREFIX

LARGEST_ORIGIN = 2**32
"""Bytes of an origin that one node sends."""
_OF_A_NODE = ("base_model_name_or_path", "peft_version")
"""Of an adapter's settings: where the node's base is, and whose release wrote them."""
_LONGEST_SETTING = 10_000
_BASE = re.compile(r"[0-9]{1,20} entries in [a-z0-9_, ]{1,100}, [0-9a-f]{16}")
"""The fingerprint of a base."""
_DTYPES = {str(x): x for x in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, slots=True)
class Statement:
    """What a node says of where its run begins; nodes of one federation say the same."""

    base: str
    """Fingerprint of the base model."""
    spec: str
    """Digest of the layers that are adapted, with all settings of the adapter."""
    heads: str
    """Digest of heads and biases."""
    adapter: str
    """Digest of the factors of version 0. Whoever drew others takes those of most."""
    size: int
    """Bytes of it all."""

    def differences(self, wanted: Statement) -> list[str]:
        """In what this is another beginning, one line each."""
        return [
            f"{key}: expected {getattr(wanted, key)}, found {getattr(self, key)}"
            for key in ("base", "spec", "heads")
            if getattr(self, key) != getattr(wanted, key)
        ]

    def header(self) -> dict[str, Any]:
        """For a message."""
        names = ("base", "spec", "heads", "adapter", "size")
        return {key: getattr(self, key) for key in names}

    @staticmethod
    def read(found: object) -> Statement:
        """What :meth:`header` said.

        Raises:
            ValueError: if it is something else.
        """
        if not isinstance(found, dict):
            raise ValueError(f"expected a statement of its model, found {short(found)}")
        base, size = found.get("base"), number(found, "size")
        if not isinstance(base, str) or not _BASE.fullmatch(base):
            raise ValueError(f"expected the fingerprint of a base, found {short(base)}")
        if size > LARGEST_ORIGIN:
            raise ValueError(f"version 0 has {size} bytes, expected at most {LARGEST_ORIGIN}")
        spec, heads, adapter = (known_digest(found.get(x)) for x in ("spec", "heads", "adapter"))
        return Statement(base, spec, heads, adapter, size)


@dataclass(frozen=True, slots=True)
class Origin:
    """Version 0, and how it is stored as an adapter."""

    layout: AdapterLayout
    base: str
    """Fingerprint of the base model."""
    precision: str
    """How the adapted frozen weights are stored."""
    adapter: Adapter
    dense: Mapping[str, Tensor]

    @property
    def spec(self) -> AdapterSpec:
        """What clients train."""
        return self.layout.spec

    def state(self) -> GlobalState:
        """Version 0."""
        modules = self.spec.modules
        total = {n: LowRank.zeros(m.d_out, m.d_in, torch.float64) for n, m in modules.items()}
        first = first_id({"": self.spec}, self.base, self.adapter, self.dense, {})
        return GlobalState(0, first, self.adapter, total, self.dense)

    def encode(self) -> tuple[Statement, bytes]:
        """What a node states, and sends if it is asked."""
        tensors = adapter_tensors(self.adapter) | dense_tensors(self.dense)
        said = _header(self.layout, self.precision)
        message = pack(tensors, said)
        statement = Statement(
            self.base,
            _spec_digest(said),
            tensors_digest(dense_tensors(self.dense)),
            adapter_digest(self.adapter),
            len(message),
        )
        return statement, message


def decode_origin(message: bytes, stated: Statement, trained: tuple[str, ...], base: str) -> Origin:
    """What :meth:`Origin.encode` made.

    Args:
        message: from a node.
        stated: what it said of it.
        trained: the factors that the method trains.
        base: the base model's name, which the adapter's settings get.

    Raises:
        ValueError: if it is something else, is not what was stated, or no plain LoRA.
    """
    tensors, header = unpack_finite(message)
    layout, precision = _read(header, trained, base)
    adapter, dense = adapter_from(tensors), dense_from(tensors)
    refuse_others(tensors, adapter_tensors(adapter) | dense_tensors(dense))
    wanted = {f"{x}/{n}": m.factor(x) for n, m in layout.spec.modules.items() for x in "AB"}
    wanted |= {f"dense/{name}": spec for name, spec in layout.spec.dense.items()}
    found = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    if odd := [name for name in wanted.keys() | found if wanted.get(name) != found.get(name)]:
        raise ValueError(f"{len(odd)} tensor(s) that its layers have not, as {short(min(odd))}")
    made = Origin(layout, stated.base, precision, adapter, dense)
    again = made.encode()[0]
    pairs = {"adapter": (again.adapter, stated.adapter)} | {
        key: (getattr(again, key), getattr(stated, key)) for key in ("spec", "heads")
    }
    if odd := [key for key, (here, there) in pairs.items() if here != there]:
        raise ValueError(f"not what was stated: {', '.join(odd)}")
    return made


def _header(layout: AdapterLayout, precision: str) -> dict[str, Any]:
    modules = {
        name: [
            *(module.d_out, module.d_in, module.rank, str(module.dtype), module.scaling),
            *(layout.modules[name].embedding, list(layout.modules[name].kernel)),
        ]
        for name, module in layout.spec.modules.items()
    }
    dense = {name: [list(x.shape), str(x.dtype)] for name, x in layout.spec.dense.items()}
    config = {**layout.config, "base_model_name_or_path": None}
    return {
        "modules": modules,
        "dense": dense,
        "names": dict(layout.names),
        "config": config,
        "precision": precision,
    }


def _spec_digest(header: Mapping[str, Any]) -> str:
    config = {key: x for key, x in header["config"].items() if key not in _OF_A_NODE}
    return text_digest(json.dumps({**header, "config": config}, sort_keys=True))


def _read(
    header: Mapping[str, Any], trained: tuple[str, ...], base: str
) -> tuple[AdapterLayout, str]:
    """The layout and the precision of a header; anything that JSON holds may be in it.

    Raises:
        ValueError: if it is something else.
    """
    keys = ("modules", "dense", "names", "config")
    tables = {key: header.get(key) for key in keys}
    precision = header.get("precision")
    if not all(isinstance(x, dict) for x in tables.values()) or not _is_plain(precision):
        raise ValueError(f"expected an origin, found {short(sorted(header))}")
    found: Mapping[str, dict[str, Any]] = tables  # type: ignore[assignment] # checked above
    tensor_names((*found["modules"], *found["dense"], *found["names"]))
    modules = {name: _module(x) for name, x in found["modules"].items()}
    dense = {name: _tensor(x) for name, x in found["dense"].items()}
    if not modules:
        raise ValueError("no layer is adapted")
    spec = AdapterSpec({n: made for n, (made, _, _) in modules.items()}, dense, trained)
    stored = {
        name: stored_module(name, made, embedding=embedding, kernel=kernel)
        for name, (made, embedding, kernel) in modules.items()
    }
    ours = {x.key(letter) for x in stored.values() for letter in "AB"}
    ours |= {f"{PREFIX}{name}" for name in dense}
    names = found["names"]
    if sorted(map(str, names.values())) != sorted(ours):
        raise ValueError("the names of its files are not those of its tensors")
    config = {**found["config"], "base_model_name_or_path": base}
    _check_config(config)
    return AdapterLayout(spec, config, names, stored), str(precision)


def _module(found: object) -> tuple[ModuleSpec, bool, tuple[int, ...]]:
    if not isinstance(found, list) or len(found) != 7:
        raise ValueError(f"expected a layer, found {short(found)}")
    *sizes, dtype, scaling, embedding, kernel = found
    if not _are_sizes(sizes) or not isinstance(kernel, list) or not _are_sizes(kernel):
        raise ValueError(f"expected sizes of a layer, found {short(found)}")
    number_ = type(scaling) is float and isfinite(scaling) and scaling != 0.0
    if dtype not in _DTYPES or not number_ or type(embedding) is not bool:
        raise ValueError(f"expected a layer's dtype and scaling, found {short(found)}")
    d_out, d_in, rank = sizes
    if d_in % prod(kernel):
        raise ValueError(f"expected a kernel that divides {d_in}, found {short(kernel)}")
    return ModuleSpec(d_out, d_in, rank, _DTYPES[dtype], scaling), embedding, tuple(kernel)


def _tensor(found: object) -> TensorSpec:
    if not isinstance(found, list) or len(found) != 2 or found[1] not in _DTYPES:
        raise ValueError(f"expected a shape and a dtype, found {short(found)}")
    if not isinstance(found[0], list) or not _are_sizes(found[0]):
        raise ValueError(f"expected a shape, found {short(found[0])}")
    return TensorSpec(tuple(found[0]), _DTYPES[found[1]])


def _are_sizes(found: list[Any]) -> bool:
    return all(type(x) is int and 1 <= x <= LARGEST for x in found)


def _is_plain(text: object) -> bool:
    return isinstance(text, str) and len(text) <= _LONGEST_SETTING and text.isprintable()


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse settings of an adapter that are none of a plain LoRA on an untouched base.

    Raises:
        ValueError: with the first fault.
    """
    if not all(map(_is_plain, _texts(config))):
        raise ValueError("settings of an adapter with texts that cannot be shown")
    if faults := list(config_faults(config)):
        raise ValueError(f"no plain LoRA: {short(faults[0])}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MUTATING):
        raise ValueError(f"init_lora_weights = {init!r} changes the base")


def _texts(value: object) -> list[object]:
    """All texts of a value, keys too."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for x in pair for text in _texts(x)]
    if isinstance(value, list):
        return [text for x in value for text in _texts(x)]
    return [value] if isinstance(value, str) else []
