"""The files of a split in a folder: one, its numbered parts, a folder of parts, or a pattern's."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedexlora.data.encoding import COMPRESSIONS
from fedexlora.errors import DataError

FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet")
"""Suffixes of files with rows; one of ``COMPRESSIONS`` may follow."""

_NAME = re.compile(
    rf"(?P<stem>[^.].*)\.(?P<format>{'|'.join(FORMATS)})(?:\.(?P<compression>{'|'.join(COMPRESSIONS)}))?",
    re.IGNORECASE,
)
# As the hub names them: train-00000-of-00002, older ones with a hash behind.
_PART = re.compile(r"[-_.](?P<number>\d+)(?:-of-(?P<count>\d+))?(?:-[0-9a-f]{16})?")
_SAVED = "state.json"
_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file with rows."""

    path: Path
    stem: str
    format: str
    """One of ``FORMATS``."""
    compression: str | None


def is_saved(folder: Path) -> bool:
    """Whether a folder holds what ``Dataset.save_to_disk`` writes."""
    return (folder / _SAVED).is_file()


def split_files(folder: Path, split: str) -> Path | list[RowFile]:
    """Where a split's rows are.

    Args:
        folder: the data set's folder; what is not in it is looked up in ``data/``, as the hub has
            it.
        split: a file's name with or without its suffix, the name before the numbers of parts, the
            name of a folder of parts, or a pattern.

    Returns:
        The folder of a saved data set, or files in the order of their names, all of one format.

    Raises:
        DataError: if there are none, several that could be meant, or a part is missing.
    """
    if Path(split).is_absolute() or ".." in Path(split).parts:
        raise DataError(f"{folder}: expected a name in it, found {split!r}, which leads out of it")
    if is_saved(folder):
        raise DataError(
            f"{folder}: expected splits, found one saved data set; name the folder above as "
            "data.source, and this one as the split"
        )
    for place in (folder, folder / "data"):
        if any(x in split for x in "*?["):
            found: list[Path | list[RowFile]] = [_by_pattern(place, split)]
        else:
            found = [_one(place, split), _parts(place, split), _inside(place / split)]
        options = [x for x in found if x]
        if len(options) > 1 or any(isinstance(x, list) and _mixed(x) for x in options):
            names = [y.path.name for x in options if isinstance(x, list) for y in x]
            names += [f"{x.name}/" for x in options if isinstance(x, Path)]
            raise DataError(_ambiguous(folder, split, names))
        if options:
            return options[0]
    raise DataError(_ambiguous(folder, split, _listing(folder)))


def _mixed(files: list[RowFile]) -> bool:
    return len({x.format for x in files}) > 1


def _ambiguous(folder: Path, split: str, found: list[str]) -> str:
    shown = ", ".join(found[:_NAMES_SHOWN]) + (", ..." if len(found) > _NAMES_SHOWN else "")
    suffixes = ",".join(f".{x}" for x in FORMATS)
    wanted = split if _parsed(Path(split)) or "*" in split else f"{split}{{{suffixes}}}"
    return (
        f"{folder}: expected exactly one file {wanted}, its numbered parts or a folder of parts, "
        f"found {shown or 'no such file'}"
    )


def _listing(folder: Path) -> list[str]:
    return [f"{x.name}/" if x.is_dir() else x.name for x in sorted(folder.iterdir())]


def _parsed(path: Path) -> RowFile | None:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    compression = match["compression"]
    return RowFile(
        path, match["stem"], match["format"].lower(), compression.lower() if compression else None
    )


def _files(folder: Path) -> list[RowFile]:
    if not folder.is_dir():
        return []
    parsed = (_parsed(x) for x in sorted(folder.iterdir()) if x.is_file())
    return [x for x in parsed if x is not None]


def _by_pattern(folder: Path, pattern: str) -> list[RowFile]:
    parsed = (_parsed(x) for x in sorted(folder.glob(pattern)) if x.is_file())
    return [x for x in parsed if x is not None]


def _one(folder: Path, split: str) -> list[RowFile]:
    named = _parsed(folder / split)
    if named is not None and named.path.is_file():
        return [named]
    alike = [x for x in _files(folder) if x.stem == split]
    if len(alike) > 1:
        raise DataError(_ambiguous(folder, split, [x.path.name for x in alike]))
    return alike


def _parts(folder: Path, split: str) -> list[RowFile]:
    """The numbered parts of a split."""
    numbered = [
        (x, match)
        for x in _files(folder)
        if x.stem.startswith(split) and (match := _PART.fullmatch(x.stem.removeprefix(split)))
    ]
    counts = {int(match["count"]) for _, match in numbered if match["count"]}
    if counts:
        have = Counter(int(match["number"]) for _, match in numbered)
        wanted = Counter(range(max(counts)))
        if len(counts) > 1 or have != wanted:
            lack = sorted((wanted - have).elements())
            raise DataError(
                f"{folder}: expected each of the {max(counts)} parts of {split!r} once, found "
                f"{', '.join(x.path.name for x, _ in numbered[:_NAMES_SHOWN])}"
                + (f"; missing: {', '.join(map(str, lack[:_NAMES_SHOWN]))}" if lack else "")
            )
    numbered.sort(key=lambda pair: int(pair[1]["number"]))
    return [x for x, _ in numbered]


def _inside(folder: Path) -> Path | list[RowFile]:
    """A saved data set, or the parts in a folder."""
    return folder if is_saved(folder) else _files(folder)
