"""A base model's files: found, opened and checked, without reading a weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from fedexlora.errors import AdapterError, BridgeError
from fedexlora.exchange.tensors import TensorFile
from fedexlora.peft_bridge.source import locate, refuse_adapter

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = frozenset(
    {".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".gguf"}
)
_NOT_COPIED = frozenset({CONFIG, "README.md", "adapter_config.json"})
"""Written anew, about another model, or taken by transformers for a sign of an adapter."""
_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A folder that transformers loads a model from, in safetensors."""

    folder: Path
    shards: tuple[TensorFile, ...]
    indexed: bool
    """Whether an index says which shard holds which tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of most of the numbers."""
        numbers: Counter[torch.dtype] = Counter()
        for shard in self.shards:
            for spec in shard.tensors.values():
                numbers[spec.dtype] += prod(spec.shape) * spec.dtype.is_floating_point
        return numbers.most_common(1)[0][0]

    def others(self) -> Iterator[Path]:
        """What belongs to the model beside its weights and configuration, as its tokenizer."""
        for path in sorted(self.folder.iterdir()):
            index = path.name.endswith(".index.json")
            hidden = path.name.startswith(".")
            kept = path.suffix not in _WEIGHT_FILES and path.name not in _NOT_COPIED
            if kept and path.is_file() and not index and not hidden:
                yield path


def open_base(source: str, revision: str | None) -> BaseFiles:
    """Find a base model's files, and read the headers of its weights.

    Args:
        source: a folder, ``package:NAME/PATH``, or a hub name, which is downloaded.
        revision: of a hub name; None for the default.

    Raises:
        AdapterError: if there is no such model, it is quantised, or its weights are not whole
            safetensors files; lists all faults.
    """
    folder = _folder(source, revision)
    if _json(folder / CONFIG).get("quantization_config"):
        raise AdapterError(
            f"{folder / CONFIG}: the base is quantised (quantization_config)",
            ["quantising the sum again would lose the update; keep it an adapter beside the base"],
        )
    names, faults = _shards(folder)
    shards = []
    for name in names:
        try:
            shards.append(TensorFile.open(folder / name))
        except (OSError, ValueError) as error:
            faults.append(f"{name}: {error}")
    if not faults:
        faults = _index_faults(folder, shards)
    if faults:
        raise AdapterError(f"{folder}: the base model's weights cannot be used", faults)
    return BaseFiles(folder, tuple(shards), indexed=not (folder / WEIGHTS).is_file())


def _folder(source: str, revision: str | None) -> Path:
    try:
        found = locate(source)
        if not (Path(found) / CONFIG).exists():
            refuse_adapter(source, Path(found))
    except BridgeError as error:
        if error.faults:
            raise AdapterError(
                error.summary.replace("model.source", "--base"), error.faults
            ) from error
        raise AdapterError(f"base model {source!r}: no such folder or installed package") from error
    if Path(found).is_dir():
        return Path(found)
    try:
        return Path(
            snapshot_download(
                found,
                revision=revision,
                allow_patterns=list(_DOWNLOADED),
                ignore_patterns=["*/*"],
            )
        )
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"base model {source!r} is no folder here, and cannot be had from the hub", [str(error)]
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _shards(folder: Path) -> tuple[list[str], list[str]]:
    """The files that hold the weights, and what is wrong with the folder."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], []
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = "found neither"
        if pickles:
            found = f"found {', '.join(pickles)}, which can run code: convert it to safetensors"
        return [], [f"expected {WEIGHTS} or {INDEX}, {found}"]
    names = sorted(set(_weight_map(folder).values()))
    faults = [f"{INDEX}: {x!r} is no file's name" for x in names if Path(x).name != x]
    return ([] if faults else names), faults


def _index_faults(folder: Path, shards: list[TensorFile]) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return []
    held = {shard.path.name: shard.tensors for shard in shards}
    return [
        f"{file}: {name} is missing, which {INDEX} says it holds"
        for name, file in _weight_map(folder).items()
        if name not in held[file]
    ]


def _weight_map(folder: Path) -> dict[str, str]:
    found = _json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise AdapterError(f"{folder / INDEX}: expected a weight_map of files by tensor")
    return found
