"""CSV and TSV: every value is the text that stands in the file, and a record is one line.

CSV is quoted (RFC 4180) and may be separated by commas, semicolons or tabs. TSV has no quotes: a
quotation mark is a character like others, as in GLUE's files.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedexlora.data.columns import Columns
from fedexlora.errors import DataError

_FAULTS_SHOWN = 5
_QUOTED = re.compile(r'"(?:[^"]|"")*"', re.DOTALL)


@dataclass(slots=True)
class _Records:
    """The records of a file, the column names first."""

    values: list[list[str]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    """The line that each begins in, from 1."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """First and last line of those that take several."""


def add_csv(path: Path, text: str, columns: Columns) -> None:
    """Add a CSV file's rows.

    Raises:
        DataError: naming the lines, if a quote is not closed, rows may have melted into one, or a
            row has more or fewer values than there are columns.
    """
    delimiter = _delimiter(path, text)
    records = _csv_records(path, text, delimiter)
    if records.spans:
        _check_lost_lines(path, text, delimiter, records)
    _add(path, records, columns)


def add_tsv(path: Path, text: str, columns: Columns) -> None:
    """Add a TSV file's rows.

    Raises:
        DataError: naming the lines, if a row has more or fewer values than there are columns; if
            the file is a quoted one.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    first = [number for number, line in enumerate(lines, 1) if line]
    records = _Records([line.split("\t") for line in lines if line], first)
    if '""' in text:
        quotes = [x for values in records.values for x in values if '"' in x]
        if all(map(_QUOTED.fullmatch, quotes)) and any('""' in x[1:-1] for x in quotes):
            raise DataError(
                f"{path}: a TSV has no quotes, but every quotation mark in it is one of CSV's; "
                "name the file .csv, which may be separated by tabs"
            )
    _add(path, records, columns)


def _delimiter(path: Path, text: str) -> str:
    """What separates the column names of the first line: a comma, a semicolon or a tab."""
    line = _QUOTED.sub("", text.partition("\n")[0])
    found = [x for x in ";\t" if x in line]
    if "," in line or not found:
        return ","
    if len(found) > 1:
        raise DataError(f"{path}: line 1: separated by semicolons and tabs; expected one of them")
    return found[0]


def _csv_records(path: Path, text: str, delimiter: str) -> _Records:
    records = _Records()
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = 0
    with _long_fields():
        try:
            for values in reader:
                last = reader.line_num
                if values:
                    records.values.append(values)
                    records.first.append(before + 1)
                    if last > before + 1:
                        records.spans.append((before + 1, last))
                before = last
        except csv.Error as error:
            raise DataError(
                f"{path}: line {before + 1}: its quotes are not those of CSV ({error}, in line "
                f"{reader.line_num}); a quote inside a quoted value is written twice. "
                "A file without quotes is a .tsv"
            ) from error
    return records


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields be longer than 131,072 characters."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_lost_lines(path: Path, text: str, delimiter: str, records: _Records) -> None:
    """Refuse records of several lines if each of the lines is a record of its own without quotes.

    Two lone quotes in a file that was written without quoting make such a record, and its other
    lines are lost in a text. A file is believed if another record shows that its writer quotes.
    """
    lines = io.StringIO(text, newline="").readlines()
    least, spans = len(records.values[0]) - 1, records.spans
    odd = [
        (first, last)
        for first, last in spans
        if all(line.count(delimiter) >= least for line in lines[first - 1 : last])
    ]
    several = {first for first, _ in spans}
    pairs = zip(records.values, records.first, strict=True)
    whole = [(values, lines[first - 1]) for values, first in pairs if first not in several]
    names = lines[0].rstrip("\r\n").split(delimiter)
    quoted = any(len(name) > 1 and name[0] == name[-1] == '"' for name in names)
    written = quoted or lines[0].startswith('"') or len(odd) < len(spans)
    quotes = written or any(delimiter in x for values, _ in whole for x in values)
    lone = any('"' in "".join(values) and '""' not in line for values, line in whole)
    if odd and (lone or not quotes):
        where = ", ".join(f"{first} to {last}" for first, last in odd[:_FAULTS_SHOWN])
        raise DataError(
            f"{path}: lines {where}{', ...' if len(odd) > _FAULTS_SHOWN else ''}: quotes make one "
            "row of them, but without quotes each line is a row; quote every value, or save the "
            "file as .tsv or .jsonl"
        )


def _add(path: Path, records: _Records, columns: Columns) -> None:
    if not records.values:
        raise DataError(f"{path}: expected a line of column names, found an empty file")
    names = records.values[0]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{path}: line 1: expected each column once, found {twice} again")
    places = zip(records.first, map(len, records.values), strict=True)
    odd = [(line, found) for line, found in places if found != len(names)]
    if odd:
        faults = [f"line {line}: found {found} value(s)" for line, found in odd[:_FAULTS_SHOWN]]
        faults += [f"and {len(odd) - _FAULTS_SHOWN} more"] if len(odd) > _FAULTS_SHOWN else []
        raise DataError(f"{path}: expected {len(names)} values in every line", faults)
    # An empty place between two separators says nothing.
    values = zip(*records.values, strict=True)
    columns.add_columns({x[0]: [y or None for y in x[1:]] for x in values}, len(records.first) - 1)
