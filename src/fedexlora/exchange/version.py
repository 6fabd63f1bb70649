"""The id of a version: a chain of digests that begins with everything that version 0 is.

    id(0) = sha256 of the tree over spec, base, adapter, heads, own adapters
    id(t) = sha256(id(t-1) | digest of step t)

Whoever holds the version ``id(t-1)`` and has step ``t`` intact is at ``id(t)``. How it adds the
steps up is its own affair: sums of floating-point numbers differ between processors, ids do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.exchange.digest import group, tensors_digest, text_digest
from fedexlora.exchange.layout import adapter_tensors, dense_tensors, each_once
from fedexlora.exchange.spec import AdapterSpec, TensorSpec

Adapter = Mapping[str, Factors]
"""Factors by module."""


def first_id(
    specs: Mapping[str, AdapterSpec],
    base: str,
    adapter: Adapter,
    dense: Mapping[str, Tensor],
    own: Mapping[str, Adapter],
) -> str:
    """The id of version 0.

    Args:
        specs: the adapters of clients that have their own, by client, and under ``""`` the common
            one.
        base: fingerprint of the base model.
        adapter: the common factors, also those that are frozen.
        dense: heads and biases, by name.
        own: the factors of the clients that have their own.
    """
    said = {client: _described(spec) for client, spec in specs.items()}
    return group(
        {
            "spec": text_digest(json.dumps(said, sort_keys=True)),
            "base": text_digest(base),
            "adapter": tensors_digest(adapter_tensors(adapter)),
            "heads": tensors_digest(dense_tensors(dense)),
            "own": group(digests_of(own)),
        }
    )


def next_id(previous: str, step: str) -> str:
    """The id of the version that a step of this digest leads to."""
    return hashlib.sha256(bytes.fromhex(previous) + bytes.fromhex(step)).hexdigest()


def adapter_digest(adapter: Adapter) -> str:
    """The digest of both factors of every module."""
    return tensors_digest(adapter_tensors(adapter))


def digests_of(own: Mapping[str, Adapter]) -> dict[str, str]:
    """The digests of clients' own adapters; one that many have is hashed once."""
    kept, shared = each_once(own)
    found = {client: adapter_digest(adapter) for client, adapter in kept.items()}
    return found | {client: found[name] for client, name in shared.items()}


def _described(spec: AdapterSpec) -> dict[str, object]:
    modules = {
        name: [m.d_out, m.d_in, m.rank, str(m.dtype), m.scaling] for name, m in spec.modules.items()
    }
    dense = {name: _shape(found) for name, found in spec.dense.items()}
    return {"modules": modules, "dense": dense, "trained": list(spec.trained)}


def _shape(spec: TensorSpec) -> list[object]:
    return [list(spec.shape), str(spec.dtype)]
