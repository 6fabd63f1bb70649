"""The training and validation rows of a run, the same on every machine for the same seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from fedexlora.data.config import DataConfig
from fedexlora.data.source import read_split
from fedexlora.errors import DataError

_TRAIN, _VALIDATION = 0, 1


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows that a run uses."""

    train: Dataset
    """Training rows, at least one, with all columns of the source."""
    validation: Dataset
    """Validation rows, at least one."""
    fingerprint: str
    """Sha256 (hex) of the rows of both splits, in order; the same wherever the files lie."""
    only: str = ""
    """The name of the split that stands for both, where a client or a server has one of them."""

    @staticmethod
    def one(name: str, rows: Dataset) -> Splits:
        """The only split that is there."""
        return Splits(rows, rows, "", name)


def load_splits(config: DataConfig, seed: int) -> Splits:
    """Read both splits and draw the subsets that the configuration asks for.

    Args:
        config: where the rows are, and how many to keep.
        seed: decides which rows a limit keeps; not negative.

    Returns:
        The splits, their rows in the order of the source.

    Raises:
        DataError: if a split is missing, cannot be read or has no rows; names both if both do.
    """
    splits: dict[str, Dataset] = {}
    faults: list[str] = []
    for name in dict.fromkeys((config.train, config.validation)):
        try:
            splits[name] = read_split(config, name)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError(f"cannot load the data set {config.source!r}", list(dict.fromkeys(faults)))
    train = _subset(splits[config.train], config.max_train_rows, [seed, _TRAIN])
    validation = _subset(splits[config.validation], config.max_validation_rows, [seed, _VALIDATION])
    return Splits(train, validation, fingerprint(train, validation))


def load_train(config: DataConfig, seed: int) -> Dataset:
    """The training rows alone, as in :func:`load_splits`.

    Raises:
        DataError: if they cannot be read or there are none.
    """
    return _subset(read_split(config, config.train), config.max_train_rows, [seed, _TRAIN])


def load_validation(config: DataConfig, seed: int) -> Dataset:
    """The validation rows alone, as in :func:`load_splits`.

    Raises:
        DataError: if they cannot be read or there are none.
    """
    rows = read_split(config, config.validation)
    return _subset(rows, config.max_validation_rows, [seed, _VALIDATION])


def fingerprint(*splits: Dataset) -> str:
    """Sha256 (hex) over the rows' columns and values; file names and formats do not enter.

    Args:
        splits: the rows, in order; the end of each one is marked.
    """
    digest = hashlib.sha256()
    for rows in splits:
        for batch in rows.with_format("arrow").iter(batch_size=1000):
            for row in batch.to_pylist():
                # dates, bytes and decimals have one fixed text
                line = json.dumps(row, sort_keys=True, default=str)
                digest.update(line.encode() + b"\n")
        digest.update(b"\x00")
    return digest.hexdigest()


def _subset(rows: Dataset, limit: int | None, seed: list[int]) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), size=limit, replace=False)
    return rows.select(np.sort(chosen))
