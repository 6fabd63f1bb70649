"""Divide the training rows among the clients, with flwr-datasets' partitioners."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from fedexlora.data.partition_config import (
    ByColumnPartition,
    DirichletPartition,
    IidPartition,
    PartitionConfig,
)
from fedexlora.errors import DataError

if TYPE_CHECKING:  # flwr-datasets takes seconds to load, and only this module needs it
    from flwr_datasets.partitioner import Partitioner

_ROW, _VALUE = "row", "value"
_LONGEST_SLUG = 48
_LATIN = re.compile(
    r"LATIN (?:SMALL|CAPITAL) (?:LETTER|LIGATURE) (?:DOTLESS |SHARP )?([A-Z]{1,2})(?: WITH .*)?"
)
_NAMES_SHOWN = 5


def client_values(
    train: Dataset, partition: PartitionConfig, shares: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """The value of the partition's column that each client stands for; none for other partitions.

    Args:
        train: the training rows.
        partition: how they were divided.
        shares: the rows of each client, as `split_clients` gives them.
    """
    if not isinstance(partition, ByColumnPartition):
        return {}
    values = train[partition.column][:]
    return {name: str(values[rows[0]]) for name, rows in shares.items()}


def split_clients(
    train: Dataset, partition: PartitionConfig, *, default_column: str | None, seed: int
) -> dict[str, list[int]]:
    """Give every training row to exactly one client.

    Args:
        train: the training rows.
        partition: how they are divided.
        default_column: the column that a Dirichlet partition without one divides by, normally the
            task's label column.
        seed: decides the division; not negative. A division by column does not depend on it.

    Returns:
        The numbers of each client's rows, at least one, by its name. Names are sorted, unique, and
        safe in a file system: ``client-00`` and so on, or a slug of the column's value; one without
        Latin letters or digits is called by the column and a number.

    Raises:
        DataError: if a column is missing or cannot be divided by, or a client would have no rows
            or fewer than asked for.
    """
    match partition:
        case IidPartition():
            return _iid(len(train), partition, seed)
        case DirichletPartition():
            return _dirichlet(train, partition, default_column, seed)
        case ByColumnPartition():
            return _by_column(train, partition)


# Every partitioner below divides a table in memory with the number of each row (and the value that
# decides its client): flwr-datasets would write cache files for a table that is itself a subset.


def _iid(rows: int, partition: IidPartition, seed: int) -> dict[str, list[int]]:
    from flwr_datasets.partitioner import IidPartitioner

    names = _numbered(partition.clients)
    _check_enough(rows, names, least=1)
    partitioner = IidPartitioner(num_partitions=partition.clients)
    partitioner.dataset = Dataset.from_dict({_ROW: np.random.default_rng(seed).permutation(rows)})
    return _shares(partitioner, names)


def _dirichlet(
    train: Dataset, partition: DirichletPartition, default_column: str | None, seed: int
) -> dict[str, list[int]]:
    from flwr_datasets.partitioner import DirichletPartitioner

    column = partition.column or default_column
    if column is None:
        raise DataError(
            "partition.column: a dirichlet partition of a task without labels needs the column "
            f"to divide by, one of {', '.join(train.column_names)}"
        )
    table = _table(train, column, 'name a column of labels, or use kind = "iid"')
    names, least = _numbered(partition.clients), partition.min_rows
    _check_enough(len(train), names, least)
    partitioner = DirichletPartitioner(
        num_partitions=len(names),
        partition_by=_VALUE,
        alpha=partition.alpha,
        min_partition_size=least,
        seed=seed,
    )
    partitioner.dataset = table
    try:
        with warnings.catch_warnings():
            # It warns of every draw that misses min_rows; drawing again is what min_rows means.
            warnings.filterwarnings("ignore", message="The specified min_partition_size")
            return _shares(partitioner, names)
    except ValueError as error:
        raise DataError(
            f"no draw divided {len(train)} rows by {column!r} among {len(names)} clients with "
            f"at least {least} row(s) each at alpha = {partition.alpha}; "
            "raise partition.alpha, or lower partition.clients or partition.min_rows"
        ) from error


def _by_column(train: Dataset, partition: ByColumnPartition) -> dict[str, list[int]]:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    partitioner = NaturalIdPartitioner(partition_by=_VALUE)
    table = _table(train, partition.column, "name the column of a row's client")
    found = table[_VALUE][:]
    values = sorted(set(found))
    # By number: numpy, which compares them, drops zero bytes at the end of a text.
    number = {value: i for i, value in enumerate(values)}
    numbers = [number[value] for value in found]
    partitioner.dataset = Dataset.from_dict({_ROW: table[_ROW][:], _VALUE: numbers})
    ids = range(partitioner.num_partitions)
    order = [values[partitioner.partition_id_to_natural_id[i]] for i in ids]
    names = _slugs(order, _slug(partition.column) or "client")
    return dict(sorted(_shares(partitioner, names).items()))


def _table(train: Dataset, column: str, advice: str) -> Dataset:
    if column not in train.column_names:
        raise DataError(
            f"partition.column: the training rows have no column {column!r}; "
            f"they have {', '.join(train.column_names)}"
        )
    dtype = str(getattr(train.features[column], "dtype", "nested values"))
    if not re.fullmatch(r"(large_)?string|u?int\d+|bool", dtype):
        raise DataError(
            f"partition.column: expected text, whole numbers or booleans in {column!r}, "
            f"found {dtype}; {advice}"
        )
    values = train[column][:]
    if missing := values.count(None):
        raise DataError(
            f"partition.column: expected a value of {column!r} in every row, "
            f"found none in {missing} of {len(values)}"
        )
    return Dataset.from_dict({_ROW: range(len(values)), _VALUE: values})


def _shares(partitioner: Partitioner, names: Sequence[str]) -> dict[str, list[int]]:
    return {name: partitioner.load_partition(i)[_ROW][:] for i, name in enumerate(names)}


def _numbered(clients: int) -> list[str]:
    width = max(2, len(str(clients - 1)))
    return [f"client-{i:0{width}d}" for i in range(clients)]


def _check_enough(rows: int, names: Sequence[str], least: int) -> None:
    if left := names[rows // least :]:
        shown = ", ".join(left[:_NAMES_SHOWN]) + (", ..." if len(left) > _NAMES_SHOWN else "")
        raise DataError(
            f"{rows} training rows are too few for {len(names)} clients with at least {least} "
            f"row(s) each: none are left for {len(left)} of them ({shown}); "
            "use fewer clients or more rows"
        )


def _slugs(values: Sequence[Any], otherwise: str) -> list[str]:
    """File names for sorted values; those that would share one get a number, in that order."""
    plain = [_slug(str(value)) for value in values]
    shared = {slug for slug, times in Counter(plain).items() if times > 1 or not slug}
    used = set(plain) - shared
    slugs = []
    for slug in plain:
        if slug in shared:
            numbered = (f"{slug or otherwise}-{number}" for number in count(1))
            slug = next(name for name in numbered if name not in used)
            used.add(slug)
        slugs.append(slug)
    return slugs


def _slug(text: str) -> str:
    """Its Latin letters, without their marks, and its digits; empty if it has none."""
    plain = "".join(_latin(x) for x in unicodedata.normalize("NFKD", text))
    words = re.sub(r"[^a-z0-9]+", "-", plain.lower())
    return words[:_LONGEST_SLUG].strip("-")


def _latin(character: str) -> str:
    """A letter without a mark that is a part of it, as in Łódź or Tromsø; nothing for a mark."""
    if character.isascii():
        return character
    if unicodedata.combining(character):
        return ""
    found = _LATIN.fullmatch(unicodedata.name(character, ""))
    return found[1] if found else "-"
