"""What one client sends at the end of a round."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.errors import UpdateError
from fedexlora.exchange.holders import holder_from
from fedexlora.exchange.records import ClientScores, HolderRecord
from fedexlora.exchange.scores import scores_from, scores_header
from fedexlora.exchange.spec import AdapterSpec, TensorSpec
from fedexlora.exchange.untrusted import LARGEST, short
from fedexlora.exchange.wire import pack, unpack

_ENTRY, _FIELDS = 256, 4096
"""Bytes of a message's header: of one tensor beside its name, and of everything else."""
_LARGEST_VALUE = 1e15
"""Beyond, the product of two finite factors may overflow float32, and with it everybody's model."""


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """One client's trained tensors; the names are those of ``AdapterSpec.tensors``."""

    client: str
    round: int
    """The round that it was trained in, from 1."""
    version: str
    """The id of the version of the global model that it was trained from."""
    num_examples: int
    """Training examples: its weight in the mean."""
    loss: float
    """Mean training loss of the round."""
    base: str
    """Fingerprint of the base model that it was trained on."""
    tensors: Mapping[str, Tensor]
    scores: ClientScores | None = None
    """Of the version that it was trained from, on the client's own rows, where clients score."""
    holder: HolderRecord | None = None
    """Of the client's model at that version, where the server has none."""
    memory: int | None = None
    """The round of what the client remembered of the method when it began, 0 for nothing; None
    where the method remembers nothing."""

    def factors(self, module: str, held: Factors) -> Factors:
        """The trained factors of ``module``; a factor that is frozen comes from ``held``."""
        return Factors(
            self.tensors.get(f"A/{module}", held.A), self.tensors.get(f"B/{module}", held.B)
        )

    def encode(self) -> bytes:
        """This update as one message."""
        return pack(self.tensors, self.header())

    def header(self) -> dict[str, Any]:
        """Everything but the tensors, for the message."""
        header: dict[str, Any] = {
            "client": self.client,
            "round": self.round,
            "version": self.version,
            "num_examples": self.num_examples,
            "loss": self.loss,
            "base": self.base,
        }
        if self.scores is not None:
            header["scores"] = scores_header(self.scores)
        if self.holder is not None:
            header["holder"] = self.holder.model_dump()
        if self.memory is not None:
            header["memory"] = self.memory
        return header


def largest_header(spec: AdapterSpec) -> int:
    """Bytes that the header of an update may have: names, shapes and a few numbers."""
    return _FIELDS + sum(len(json.dumps(name)) + _ENTRY for name in spec.tensors())


def largest_update(spec: AdapterSpec) -> int:
    """Bytes that a whole update may have."""
    tensors = spec.tensors().values()
    content = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    return 8 + largest_header(spec) + content


def decode_update(
    message: bytes,
    spec: AdapterSpec,
    round_: int,
    client: str,
    metrics: Collection[str] = (),
    *,
    holder: bool = False,
    remembers: bool = False,
) -> ClientUpdate:
    """The update in ``message``, which came from ``client`` in ``round_``; not yet checked.

    Nothing of a message is read that is larger than what ``spec`` asks for.

    Args:
        message: what arrived.
        spec: what it must contain.
        round_: the round, which errors name.
        client: who sent it.
        metrics: the scores that it must have; none if not given.
        holder: whether it must have the client's half of the certificate.
        remembers: whether clients remember something of the method, and say of which round.

    Raises:
        UpdateError: if the message is too large or damaged, its header lacks a field or has another
            type, or its figures are not finite numbers under known names.
    """
    sizes = {
        "an update": (len(message), largest_update(spec)),
        "its header": (int.from_bytes(message[:8], "little"), largest_header(spec)),
    }
    large = [
        f"{what} of {found} bytes, expected at most {most}"
        for what, (found, most) in sizes.items()
        if found > most
    ]
    if large:
        raise UpdateError(round_, client, large)
    try:
        tensors, header = unpack(message)
    except ValueError as error:
        raise UpdateError(round_, client, [str(error)]) from error
    fields: dict[str, type] = {
        "client": str,
        "round": int,
        "version": str,
        "num_examples": int,
        "loss": float,
        "base": str,
        **({"memory": int} if remembers else {}),
    }
    faults = [
        f"header {key!r}: expected {kind.__name__}, found {short(header.get(key))}"
        for key, kind in fields.items()
        if type(header.get(key)) is not kind
    ]
    scores = None
    if metrics:
        scores, more = scores_from(header.pop("scores", None), metrics)
        faults += more
    half = None
    if holder:
        half, more = holder_from(header.pop("holder", None))
        faults += more
    if unknown := header.keys() - fields.keys():
        faults.append(f"header: unexpected {short(sorted(unknown))}")
    if faults:
        raise UpdateError(round_, client, faults)
    values: dict[str, Any] = header
    return ClientUpdate(**values, tensors=tensors, scores=scores, holder=half)


def check_update(
    update: ClientUpdate,
    spec: AdapterSpec,
    *,
    client: str,
    round_: int,
    version: str,
    base: str,
    rows: int | None = None,
) -> None:
    """Hold an update against what was agreed.

    Args:
        update: what arrived.
        spec: the tensors that this client must send, at the rank that it declared.
        client: who sent it.
        round_: the round that is open.
        version: the id of the version that clients train from in this round.
        base: fingerprint of the base model that the run is about.
        rows: the training rows that the client has declared; None if they are not known.

    Raises:
        UpdateError: naming every fault: tensors that are missing, unexpected, of another shape or
            dtype, not finite or too large; another client, round, version or base model; no
            examples, more than can be counted, or another number than was declared; a loss that is
            not finite.
    """
    said = (("client", client), ("round", round_), ("version", version), ("base", base))
    faults = [
        f"{field}: expected {expected!r}, found {short(getattr(update, field))}"
        for field, expected in said
        if getattr(update, field) != expected
    ]
    if not 1 <= update.num_examples <= LARGEST:
        bound = "at least 1" if update.num_examples < 1 else f"at most {LARGEST}"
        faults.append(f"num_examples: expected {bound}, found {short(update.num_examples)}")
    elif rows not in (None, update.num_examples):
        faults.append(f"num_examples: expected the {rows} declared, found {update.num_examples}")
    if not isfinite(update.loss):
        faults.append(f"loss: expected a finite number, found {update.loss}")
    expected_tensors = spec.tensors()
    faults += [f"{name}: unexpected" for name in update.tensors if name not in expected_tensors]
    for name, expected in expected_tensors.items():
        faults += _tensor_faults(name, expected, update.tensors.get(name))
    if faults:
        raise UpdateError(round_, client, faults)


def _tensor_faults(name: str, expected: TensorSpec, found: Tensor | None) -> list[str]:
    if found is None:
        return [f"{name}: missing, expected {expected}"]
    if TensorSpec.of(found) != expected:
        return [f"{name}: expected {expected}, found {TensorSpec.of(found)}"]
    if bad := int((~found.isfinite()).sum()):
        return [f"{name}: {bad} of {found.numel()} values are not finite"]
    largest = float(found.abs().max()) if found.numel() else 0.0
    if largest > _LARGEST_VALUE:
        return [f"{name}: expected values of at most {_LARGEST_VALUE:g}, found {largest:g}"]
    return []
