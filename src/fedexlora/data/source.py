"""Read one split: files of a folder, or a split of a data set on the hub.

Local rows are held in memory, or read from where ``save_to_disk`` put them: no copy of them is
written anywhere, and what is read is what the files hold now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError

from fedexlora.data.columns import Columns
from fedexlora.data.config import DataConfig
from fedexlora.data.csv_rows import add_csv, add_tsv
from fedexlora.data.encoding import read_content, read_text
from fedexlora.data.files import FORMATS, RowFile, split_files
from fedexlora.data.json_rows import add_json, add_json_lines
from fedexlora.errors import DataError

Reader: TypeAlias = Callable[[Path, str, Columns], None]

_READERS: Mapping[str, Reader] = {
    "jsonl": add_json_lines,
    "ndjson": add_json_lines,
    "json": add_json,
    "csv": add_csv,
    "tsv": add_tsv,
}


def read_split(config: DataConfig, split: str) -> Dataset:
    """All rows of one split.

    Args:
        config: names the folder or the data set.
        split: the split's name on the hub, or of its files in the folder.

    Returns:
        The rows in the order of the source; never none.

    Raises:
        DataError: if the source or the split is missing, cannot be read or has no rows.
    """
    folder = Path(config.source).expanduser()
    if folder.is_dir():
        rows = _read_folder(folder, split)
    elif folder.exists() or config.source.startswith((".", "/", "~")):
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"expected a folder at {str(folder)!r}, found {found}")
    else:
        rows = _read_hub(config, split)
    if len(rows) == 0:
        raise DataError(f"split {split!r} of {config.source!r}: expected rows, found none")
    return rows


def _read_folder(folder: Path, split: str) -> Dataset:
    found = split_files(folder, split)
    if isinstance(found, Path):
        return _read_saved(found)
    if found[0].format == "parquet":
        return _joined([_read_parquet(file) for file in found], found)
    columns = Columns()
    for file in found:
        columns.begin(file.path)
        _READERS[file.format](file.path, read_text(file.path, file.compression), columns)
    if columns.rows == 0:
        raise DataError(f"{found[0].path}: expected rows, found none")
    return Dataset(columns.table())


def _read_parquet(file: RowFile) -> Dataset:
    content = read_content(file.path, file.compression)
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read()
        return Dataset(_plain(table))
    except (ValueError, OSError, pa.ArrowException, NotImplementedError) as error:
        raise DataError(f"{file.path}: {_words(error)}") from error


def _plain(table: pa.Table) -> pa.Table:
    """The table with text of pandas' categories, and Arrow's views of text, as text."""
    fields = []
    for column in table.schema:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        fields.append(column.with_type(pa.string() if kind == pa.string_view() else kind))
    return table.cast(pa.schema(fields, metadata=table.schema.metadata))


def _joined(parts: Sequence[Dataset], files: Sequence[RowFile]) -> Dataset:
    try:
        return concatenate_datasets(list(parts)) if len(parts) > 1 else parts[0]
    except (ValueError, pa.ArrowException) as error:
        names = f"{files[0].path.name} to {files[-1].path.name}"
        raise DataError(
            f"{files[0].path.parent}: the columns of {names} differ: {_words(error)}"
        ) from error


def _read_saved(folder: Path) -> Dataset:
    try:
        return load_from_disk(str(folder))
    except (ValueError, OSError, KeyError, DatasetsError, pa.ArrowException) as error:
        raise DataError(f"{folder}: no whole saved data set: {_words(error)}") from error


def _read_hub(config: DataConfig, split: str) -> Dataset:
    try:
        return load_dataset(config.source, config.config, split=split, revision=config.revision)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        if cache := _unwritable_cache():
            raise DataError(
                f"the cache of data sets from the hub cannot be written: {cache}; "
                "HF_HOME, or HF_DATASETS_CACHE, names another folder"
            ) from error
        name = config.source if config.config is None else f"{config.source}/{config.config}"
        raise DataError(
            f"cannot read split {split!r} of {name!r} from the hub: {_words(error)}; "
            f"to use local files, set `source` to a folder with {split}.jsonl "
            f"(or {', '.join(f'.{x}' for x in FORMATS[1:])}) in it"
        ) from error


def _unwritable_cache() -> str | None:
    """The folder of the cache that cannot be written, and why; None if all can."""
    for folder in (datasets_config.HF_CACHE_HOME, datasets_config.HF_DATASETS_CACHE):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            return f"{folder}: {error.strerror}"
    return None


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
