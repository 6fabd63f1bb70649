"""Which tensor of a base's files becomes what, and what is wrong with it, before any is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedexlora.errors import AdapterError
from fedexlora.exchange.spec import TensorSpec
from fedexlora.peft_bridge.adapter_file import AdapterFile
from fedexlora.peft_bridge.base_files import BaseFiles
from fedexlora.peft_bridge.changes import Change, wanted_changes
from fedexlora.peft_bridge.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class MergePlan:
    """How the files of a base become those of the merged model."""

    names: Mapping[str, str]
    """The name in the result of every tensor of the base's files."""
    changes: Mapping[str, tuple[str, Change]]
    """The parameter's name and what becomes of it, by name in the base's files."""
    added: Mapping[str, str]
    """The adapter's tensors that the base lacks, by their name in the result."""


def plan_merge(adapter: AdapterFile, files: BaseFiles, skeleton: Skeleton) -> MergePlan:
    """Find the tensor of the files for everything that the adapter changes.

    Raises:
        AdapterError: listing every layer and tensor that does not fit, or cannot be merged.
    """
    wanted, faults = wanted_changes(adapter, skeleton)
    specs = {name: spec for shard in files.shards for name, spec in shard.tensors.items()}
    loaded = skeleton.loaded_as(specs)
    sources: dict[str, list[str]] = {}
    for name, parameter in loaded.items():
        if parameter is not None:
            sources.setdefault(parameter, []).append(name)
    changes: dict[str, tuple[str, Change]] = {}
    added: dict[str, str] = {}
    for parameter, change in wanted.items():
        found = sources.get(parameter, [])
        lacking = not found and not _converted(parameter, loaded, skeleton)
        if lacking and change.whole and change.replaced:
            added[parameter] = change.replaced
        elif fault := _source_fault(parameter, found, specs, skeleton, change):
            faults.append(fault)
        else:
            changes[found[0]] = (parameter, change)
    if not faults:
        faults += _gaps(skeleton, loaded, added)
        faults += _resized(skeleton, loaded, specs, changes)
    names = _names(specs, skeleton, added)
    if not faults and not _read_alike(names, loaded, added, skeleton):
        faults.append(f"the names of the new heads {sorted(added)} do not go with the base's names")
    if faults:
        raise AdapterError(
            f"{adapter.folder} cannot be merged into {files.folder} ({skeleton.class_name})", faults
        )
    return MergePlan(names, changes, added)


def _converted(parameter: str, loaded: Mapping[str, str | None], skeleton: Skeleton) -> bool:
    """Whether the files may hold a parameter in another form, as fused experts; heads never are."""
    body = not skeleton.has_head or parameter.startswith(f"{skeleton.prefix}.")
    return body and None in loaded.values()


def _source_fault(
    parameter: str,
    found: list[str],
    specs: Mapping[str, TensorSpec],
    skeleton: Skeleton,
    change: Change,
) -> str | None:
    if len(found) != 1:
        what = ", ".join(found) if found else "none, or in another form; the adapter form is exact"
        return f"{parameter}: expected one tensor of the base's files, found {what}"
    spec, shape = specs[found[0]], skeleton.shapes[parameter]
    # Of a table whose rows the adapter has, all of them, the base may have fewer or more.
    resized = bool(change.replaced) and spec.shape[1:] == shape[1:]
    if (spec.shape != shape and not resized) or not spec.dtype.is_floating_point:
        return f"{parameter}: expected floating-point numbers {list(shape)}, found {spec}"
    return None


def _gaps(
    skeleton: Skeleton, loaded: Mapping[str, str | None], added: Mapping[str, str]
) -> Iterator[str]:
    """Parameters that would be random numbers in the result.

    A body alone may have them, as poolers that nobody uses.
    """
    if not skeleton.has_head:
        return
    present = {*loaded.values(), *added}
    optional = skeleton.model._keys_to_ignore_on_load_missing or ()
    for name, _ in skeleton.model.named_parameters():
        one_of = {name, *skeleton.shared.get(name, ())}
        excused = any(re.search(pattern, name) for pattern in optional)
        if not (one_of & present or excused or _converted(name, loaded, skeleton)):
            yield f"{name}: neither the base nor the adapter has it, so it would be random"


def _resized(
    skeleton: Skeleton,
    loaded: Mapping[str, str | None],
    specs: Mapping[str, TensorSpec],
    changes: Mapping[str, tuple[str, Change]],
) -> Iterator[str]:
    """Tables that lack the rows of the tokens that the adapter added."""
    for name, parameter in loaded.items():
        if parameter is None or name in changes:
            continue
        shape, found = skeleton.shapes[parameter], specs[name].shape
        if found != shape and found[1:] == shape[1:]:
            yield (
                f"{parameter}: the adapter is for {shape[0]} tokens, the base has {found[0]} rows, "
                f"and nobody stored the others; resize the base first, with "
                f"model.resize_token_embeddings({shape[0]}) as in training, and merge into that"
            )


def _names(
    specs: Mapping[str, TensorSpec], skeleton: Skeleton, added: Mapping[str, str]
) -> dict[str, str]:
    """Names in the result: the file's, and those of a body get its prefix once it has a head."""
    start = f"{skeleton.prefix}."
    bare = skeleton.has_head and not any(name.startswith(start) for name in specs)
    return {name: f"{start}{name}" if added and bare else name for name in specs}


def _read_alike(
    names: Mapping[str, str],
    loaded: Mapping[str, str | None],
    added: Mapping[str, str],
    skeleton: Skeleton,
) -> bool:
    """Whether every tensor is loaded as the same parameter as before, and every new one too."""
    expected = {names[name]: parameter for name, parameter in loaded.items()}
    expected |= {name: name for name in added}
    return skeleton.loaded_as((*names.values(), *added)) == expected
