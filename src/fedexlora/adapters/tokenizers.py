"""The tokenizer that trainers store beside an adapter: carried over if it is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedexlora.peft_bridge.adapter_file import AdapterFile

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What transformers stores of a tokenizer."""
_OF_A_CALL = {
    "tokenizer.json": ("padding", "truncation"),
    "tokenizer_config.json": (
        "name_or_path",
        "tokenizer_file",
        "padding_side",
        "truncation_side",
        "model_max_length",
        "max_length",
        "stride",
        "truncation_strategy",
        "pad_to_multiple_of",
        "is_local",
        "local_files_only",
        "transformers_version",
    ),
}
"""Keys that say how or where a tokenizer was called, and nothing about tokens."""


def tokenizer_faults(adapters: Sequence[AdapterFile]) -> list[str]:
    """Where the adapters' tokenizers are not one; adapters without any say nothing."""
    having = _having(adapters)
    if not having:
        return []
    first, *others = having
    names = {name for folder in having for name in FILES if (folder / name).is_file()}
    return [
        f"{folder / name}: differs from {first / name}; the same ids stand for other texts or "
        f"templates. If the adapters were trained with one tokenizer, remove the wrong files"
        for folder in others
        for name in sorted(names)
        if _content(folder / name) != _content(first / name)
    ]


def copy_tokenizer(adapters: Sequence[AdapterFile], folder: Path) -> tuple[str, ...]:
    """Copy the adapters' one tokenizer; returns the names of its files."""
    having = _having(adapters)
    names = tuple(name for name in FILES if having and (having[0] / name).is_file())
    for name in names:
        shutil.copyfile(having[0] / name, folder / name)
    return names


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a folder."""
    return any((folder / name).is_file() for name in FILES)


def _having(adapters: Sequence[AdapterFile]) -> list[Path]:
    return [adapter.folder for adapter in adapters if has_tokenizer(adapter.folder)]


def _content(path: Path) -> object:
    """What a file says, however it is written; None if there is none."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        found = json.loads(content)
    except ValueError:
        return content
    if isinstance(found, dict):
        return {k: v for k, v in found.items() if k not in _OF_A_CALL.get(path.name, ())}
    return found
