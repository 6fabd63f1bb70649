"""A user's own PEFT model, to and from what travels: in a client, and where a run starts and ends.

A client's part is two calls around its own training:

    load_arrays(model, msg.content["arrays"])
    ...
    arrays = update_arrays(model, msg, num_examples=len(rows), loss=loss)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Message
from torch import nn

from fedexlora.errors import BridgeError, RunError
from fedexlora.exchange.files import new_folder
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.update import ClientUpdate
from fedexlora.flower.arrays import UPDATE, Shared, byte_record, pack_shared, unpack_shared
from fedexlora.methods.fedex import FEDEX
from fedexlora.peft_bridge.export import save_global
from fedexlora.peft_bridge.model import AdaptedModel

_RESIDENT = "_fedexlora_resident"


@dataclass(slots=True)
class _Resident:
    """What is known of a live model: its adapted form, and the id of the version loaded last."""

    adapted: AdaptedModel
    version: str | None = None


def initial_arrays(model: nn.Module) -> ArrayRecord:
    """What ``strategy.start(grid, initial_arrays=...)`` begins with: version 0 of ``model``.

    Args:
        model: a PEFT model with a LoRA adapter named ``default``, whose base is the clients' in
            weights and precision; both factors are made trainable.

    Returns:
        The adapter, the trained heads, the scalings and a fingerprint of the base: all that the
        strategy needs to know of the model.

    Raises:
        BridgeError: if the model cannot be aggregated exactly, with every reason.
    """
    adapted = _resident(model).adapted
    _refuse_narrow(adapted.spec)
    return pack_shared(Shared(adapted.initial_state(), adapted.spec, adapted.base_fingerprint))


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> None:
    """Make ``model`` the global model, in place: adapter, heads and all remainders.

    It may be a model made anew or one that holds another version: the remainder is set, never
    added to what is there. It rides beside the weights as a frozen float32 adapter, whose branch
    is added in float32, so that it is applied under autocast too. Frozen layers with running
    statistics use them in training mode as well, and never move them.

    Args:
        model: a PEFT model made as the one of :func:`initial_arrays` was.
        arrays: ``msg.content["arrays"]``, the arrays of an ``evaluate_fn``, or ``result.arrays``.

    Raises:
        RunError: if the arrays hold no version of a global model.
        BridgeError: if it is one of another model, naming every module, shape, dtype and scaling
            that differs; ``model`` is unchanged then.
    """
    _load(_resident(model), unpack_shared(arrays))


def update_arrays(model: nn.Module, msg: Message, *, num_examples: int, loss: float) -> ArrayRecord:
    """What a client sends back for ``msg``, the message whose arrays it loaded.

    Args:
        model: the model after training.
        msg: the server's message.
        num_examples: training examples, as the reply's ``MetricRecord`` states them too.
        loss: the mean training loss: a client whose loss is not finite is left out.

    Raises:
        RunError: if no arrays were loaded into the model, or the message names no round.
    """
    resident = _resident(model)
    if resident.version is None:
        raise RunError("update_arrays: load_arrays was not called on this model")
    update = ClientUpdate(
        client=str(msg.metadata.dst_node_id),
        round=_server_round(msg),
        version=resident.version,
        num_examples=int(num_examples),
        loss=float(loss),
        base=resident.adapted.base_fingerprint,
        tensors=resident.adapted.update_tensors(),
    )
    return byte_record(UPDATE, update.encode())


def save_adapter(model: nn.Module, arrays: ArrayRecord, folder: str | Path) -> None:
    """Write a global model, all remainders included, as one standard PEFT adapter.

    ``PeftModel.from_pretrained`` on the untouched base then *is* the global model.

    Args:
        model: a model made as the clients' are; it becomes the global model.
        arrays: ``result.arrays``, or those of an ``evaluate_fn``.
        folder: a folder that does not exist or is empty; whole afterwards, or not there.

    Raises:
        RunError: if the arrays hold no global model, as when no round succeeded.
        BridgeError: if they belong to another model, or the folder holds something.
    """
    out, shared = Path(folder), unpack_shared(arrays)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BridgeError(f"{out} already exists", ["choose another folder"])
    resident = _resident(model)
    _load(resident, shared)
    with new_folder(out) as written:
        save_global(resident.adapted, shared.state, written)


def _resident(model: nn.Module) -> _Resident:
    """What is known of ``model``, kept on it: its version 0 can be read only once."""
    found = model.__dict__.get(_RESIDENT)
    if not isinstance(found, _Resident):
        # Its user trains and scores it in whatever arithmetic: beside the weight holds in any.
        found = _Resident(AdaptedModel(model, FEDEX.default.factors, "side"))
        setattr(model, _RESIDENT, found)
    return found


def _load(resident: _Resident, shared: Shared) -> None:
    adapted = resident.adapted
    faults = list(_differences(shared.spec, adapted.spec))
    if shared.base != adapted.base_fingerprint:
        faults.append(f"base model: expected {shared.base}, found {adapted.base_fingerprint}")
    if faults:
        raise BridgeError("the global model is not one of this model", faults)
    adapted.apply(shared.state)
    resident.version = shared.state.id


def _differences(expected: AdapterSpec, found: AdapterSpec) -> Iterator[str]:
    for name in sorted(expected.modules.keys() | found.modules.keys()):
        one, other = expected.modules.get(name), found.modules.get(name)
        if one != other:
            yield f"{name}: expected {one or 'no adapter'}, found {other or 'no adapter'}"
    for name in sorted(expected.dense.keys() | found.dense.keys()):
        wanted, there = expected.dense.get(name), found.dense.get(name)
        if wanted != there:
            yield f"{name}: expected {wanted or 'nothing trained'}, found {there or 'nothing'}"


def _refuse_narrow(spec: AdapterSpec) -> None:
    narrow = [name for name, m in spec.modules.items() if m.dtype.itemsize < torch.float32.itemsize]
    if narrow:
        raise BridgeError(
            "these factors are too narrow to hold the clients' mean; leave PEFT's "
            "autocast_adapter_dtype on, whatever the dtype of the base",
            [f"{name}: {str(spec.modules[name].dtype).removeprefix('torch.')}" for name in narrow],
        )


def _server_round(msg: Message) -> int:
    for config in msg.content.config_records.values():
        found = config.get("server-round")
        if isinstance(found, int):
            return found
    raise RunError("update_arrays: the message has no 'server-round' in its configuration")
