"""What a model can take: positions, tokens that it has embeddings of, numbers of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from fedexlora.data.config import TaskConfig
from fedexlora.errors import DataError

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")
_STATED = ("max_position_embeddings", "max_seq_len")
_HEADED = "ForSequenceClassification"
_SHOWN = 5


def load_config(path: str, revision: str | None) -> PretrainedConfig:
    """A model's configuration.

    Args:
        path: a folder, or a model's name on the hub.
        revision: the hub's branch, tag or commit; the default branch if None.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the configuration of {path!r}: {error}") from error


def check_config(
    task: TaskConfig,
    outputs: int | None,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse what cannot fit a model, before it is loaded.

    Args:
        task: the task's configuration.
        outputs: of the head that the task needs; None if it needs none of its own.
        config: the model's configuration.
        tokenizer: the model's.

    Raises:
        DataError: with all faults: a ``max_length`` above the positions that the configuration
            states, a padding token without an embedding, a trained head of another size.
    """
    faults = _length_faults(task.max_length, min(_stated(config), default=None))
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int):
        faults += _padding_faults(tokenizer, rows)
    headed = any(x.endswith(_HEADED) for x in config.architectures or ())
    if headed and outputs is not None and outputs != config.num_labels:
        faults.append(
            f"the model's files have a trained head with {config.num_labels} output(s), and the "
            f"{task.kind} task needs {outputs}; use the model that it was made from"
        )
    if faults:
        raise DataError("the recipe does not fit the model", faults)


def check_capacity(
    task: TaskConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Mapping[str, Dataset],
    *,
    half: bool,
) -> None:
    """Refuse rows that the model would fail on, or be silently wrong.

    Args:
        task: the task's configuration.
        model: the model, with or without an adapter.
        tokenizer: the one that the rows were tokenised with.
        tokenized: tokenised rows by split.
        half: whether any of the arithmetic is float16.

    Raises:
        DataError: with all faults: a ``max_length`` above the model's positions, tokens (also the
            padding token) without an embedding, labels that float16 does not hold.
    """
    faults = _length_faults(task.max_length, positions(model))
    rows = _embeddings(model)
    if rows is not None:
        faults += _padding_faults(tokenizer, rows)
        for split, found in tokenized.items():
            faults += _token_faults(split, found, tokenizer, rows)
    kinds = getattr(getattr(model, "config", None), "type_vocab_size", None)
    for split, found in tokenized.items():
        faults += _kind_faults(split, found, kinds)
    if task.kind == "regression" and half:
        for split, found in tokenized.items():
            faults += _range_faults(split, found)
    if faults:
        raise DataError("the rows do not fit the model", faults)


def positions(model: nn.Module) -> int | None:
    """The longest row that a model reads, in tokens; None if nothing bounds it.

    The smaller of what its configuration states and what its table of positions holds: models of
    RoBERTa's kind leave out the positions up to that of padding, OPT and BART the first two.
    """
    config = getattr(model, "config", None)
    found = [] if config is None else _stated(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            padding = module.padding_idx
            left_out = getattr(module, "offset", 0 if padding is None else padding + 1)
            found.append(module.num_embeddings - left_out)
    return min(found, default=None)


def _stated(config: PretrainedConfig) -> list[int]:
    """The positions that a configuration states, under any of its names."""
    text = config.get_text_config()
    found = [getattr(text, key, None) for key in _STATED]
    return [x for x in found if isinstance(x, int) and x > 0]


def _length_faults(max_length: int, longest: int | None) -> list[str]:
    if longest is None or max_length <= longest:
        return []
    wanted = f"expected at most {longest}, the positions that the model has"
    return [f"task.max_length: {wanted}; found {max_length}"]


def _embeddings(model: nn.Module) -> int | None:
    """The number of tokens that the model has embeddings of."""
    find: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    weight = None if find is None else getattr(find(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def _padding_faults(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    padding = tokenizer.pad_token_id
    if padding < rows:
        return []
    found = f"{tokenizer.pad_token!r}, id {padding}, but the model has {rows} embeddings"
    way_out = "set its pad_token to one that the model has, such as its end token"
    return [f"the tokenizer pads with {found}; {way_out}"]


def _token_faults(
    split: str, tokenized: Dataset, tokenizer: PreTrainedTokenizerBase, rows: int
) -> list[str]:
    tokens = pc.list_flatten(tokenized.with_format("arrow")["input_ids"][:])
    if (pc.max(tokens).as_py() or 0) < rows:
        return []
    beyond: dict[int, list[int]] = {}
    for row, ids in enumerate(tokenized["input_ids"][:], 1):
        for token in {x for x in ids if x >= rows}:
            beyond.setdefault(token, []).append(row)
    faults = [
        f"{split}: the model has {rows} embeddings, and none of the token "
        f"{tokenizer.convert_ids_to_tokens(token)!r}, id {token}, which {len(found)} row(s) hold, "
        f"the first is row {found[0]}; the tokenizer has tokens that the model was not resized for"
        for token, found in sorted(beyond.items())[:_SHOWN]
    ]
    more = len(beyond) - _SHOWN
    return faults + ([f"{split}: and {more} more such token(s)"] if more > 0 else [])


def _kind_faults(split: str, tokenized: Dataset, kinds: int | None) -> list[str]:
    """Faults of the numbers that tell the two texts of a pair apart."""
    if kinds is None or "token_type_ids" not in tokenized.column_names:
        return []
    numbers = pc.list_flatten(tokenized.with_format("arrow")["token_type_ids"][:])
    if (pc.max(numbers).as_py() or 0) < kinds:
        return []
    found = f"the tokenizer makes {pc.max(numbers).as_py() + 1}, the model knows {kinds}"
    return [f"{split}: kinds of tokens, for the texts of a pair: {found}; use its own tokenizer"]


def _range_faults(split: str, tokenized: Dataset) -> list[str]:
    most = torch.finfo(torch.float16).max
    labels = np.asarray(tokenized["labels"][:], dtype=np.float64)
    odd = np.flatnonzero(np.abs(labels) > most)
    if not len(odd):
        return []
    found = f"found {labels[odd[0]]:g} in row {odd[0] + 1} ({len(odd)} such row(s))"
    wanted = f"expected labels up to {most:g}, the largest number of float16"
    return [f"{split}: {wanted}; {found}; scale the labels, or train in float32 or bfloat16"]
