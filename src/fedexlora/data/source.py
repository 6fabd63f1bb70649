"""Read one split: a file of a folder, or a split of a data set on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from fedexlora.data.config import DataConfig
from fedexlora.errors import DataError

# pandas would read "NA", "None" and "null" as missing; in a text they are words.
_CSV: Mapping[str, Any] = {"keep_default_na": False, "na_values": [""]}
_READERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}


def read_split(config: DataConfig, split: str) -> Dataset:
    """All rows of one split.

    Args:
        config: names the folder or the data set.
        split: the split's name on the hub, or its file in the folder.

    Returns:
        The rows in the order of the source; never none.

    Raises:
        DataError: if the source or the split is missing, cannot be read or has no rows.
    """
    folder = Path(config.source).expanduser()
    if folder.is_dir():
        rows = _read_file(_find_file(folder, split))
    elif folder.exists() or config.source.startswith((".", "/", "~")):
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"expected a folder at {str(folder)!r}, found {found}")
    else:
        rows = _read_hub(config, split)
    if len(rows) == 0:
        raise DataError(f"split {split!r} of {config.source!r}: expected rows, found none")
    return rows


def _find_file(folder: Path, split: str) -> Path:
    files = sorted(x for x in folder.iterdir() if x.is_file() and x.suffix in _READERS)
    named = [x for x in files if x.name == split] or [x for x in files if x.stem == split]
    if len(named) == 1:
        return named[0]
    found = ", ".join(x.name for x in (named or files)) or "no such file"
    wanted = split if Path(split).suffix in _READERS else f"{split}{{{','.join(_READERS)}}}"
    raise DataError(f"{folder}: expected exactly one file {wanted}, found {found}")


def _read_file(path: Path) -> Dataset:
    reader, options = _READERS[path.suffix]
    if reader != "parquet":
        _check_utf8(path)
    try:
        return load_dataset(reader, data_files={"rows": str(path)}, split="rows", **options)
    except StopIteration:  # how datasets says that a JSON file has no value in it
        raise DataError(f"{path}: expected rows, found none") from None
    except (ValueError, OSError, DatasetsError) as error:
        # datasets hides the reader's own words in the cause
        words = _bad_line(path) if path.suffix == ".jsonl" else None
        raise DataError(f"{path}: {words or _words(error.__cause__ or error)}") from error


def _check_utf8(path: Path) -> None:
    # The JSON reader would pass other bytes on, to fail wherever the text is used first.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: line {number}: expected UTF-8, found {error}") from error


def _bad_line(path: Path) -> str | None:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                return f"line {number}: expected a JSON object, found {error}"
            if not isinstance(row, dict):
                return f"line {number}: expected a JSON object, found {type(row).__name__}"
    return None


def _read_hub(config: DataConfig, split: str) -> Dataset:
    try:
        return load_dataset(config.source, config.config, split=split, revision=config.revision)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        name = config.source if config.config is None else f"{config.source}/{config.config}"
        raise DataError(
            f"cannot read split {split!r} of {name!r} from the hub: {_words(error)}; "
            f"to use local files, set `source` to a folder with {split}.jsonl "
            f"(or {', '.join(list(_READERS)[1:])}) in it"
        ) from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
