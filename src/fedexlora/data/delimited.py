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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedexlora.data.columns import Columns
from fedexlora.errors import DataError

_FAULTS_SHOWN = 5
_QUOTED = re.compile(r'"(?:[^"]|"")*"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Record:
    first: int
    """Its first line, from 1."""
    last: int
    fields: list[str]


def add_csv(path: Path, text: str, columns: Columns) -> None:
    """Add a CSV file's rows.

    Raises:
        DataError: naming the lines, if a quote is not closed, rows may have melted into one, or a
            row has more or fewer values than there are columns.
    """
    delimiter = _delimiter(path, text)
    records = list(_csv_records(path, text, delimiter))
    _check_melted(path, text, delimiter, records)
    _add(path, records, columns)


def add_tsv(path: Path, text: str, columns: Columns) -> None:
    """Add a TSV file's rows.

    Raises:
        DataError: naming the lines, if a row has more or fewer values than there are columns; if
            the file is a quoted one.
    """
    lines = text.split("\n")
    records = [
        _Record(number, number, line.removesuffix("\r").split("\t"))
        for number, line in enumerate(lines, 1)
        if line.removesuffix("\r")
    ]
    if '""' in text:
        quotes = [x for record in records for x in record.fields if '"' in x]
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


def _csv_records(path: Path, text: str, delimiter: str) -> Iterator[_Record]:
    lines = io.StringIO(text, newline="")
    reader, before = csv.reader(lines, delimiter=delimiter, strict=True), 0
    with _long_fields():
        try:
            for fields in reader:
                if fields:
                    yield _Record(before + 1, reader.line_num, fields)
                before = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"{path}: line {before + 1}: its quotes are not those of CSV ({error}, in line "
                f"{reader.line_num}); a quote inside a quoted value is written twice. "
                "A file without quotes is a .tsv"
            ) from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields be longer than 131,072 characters."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_melted(path: Path, text: str, delimiter: str, records: Sequence[_Record]) -> None:
    """Refuse records of several lines if each of the lines is a record of its own without quotes.

    Two lone quotes in a file that was written without quoting make such a record, and its other
    lines are lost in a text. A file is believed if another record shows that its writer quotes.
    """
    spans = [record for record in records if record.last > record.first]
    if not spans:
        return
    lines = io.StringIO(text, newline="").readlines()
    least = len(records[0].fields) - 1
    odd = [
        span
        for span in spans
        if all(x.count(delimiter) >= least for x in lines[span.first - 1 : span.last])
    ]
    whole = [record for record in records if record.last == record.first]
    written = lines[0].startswith('"') or len(odd) < len(spans)
    quotes = written or any(delimiter in x for record in whole for x in record.fields)
    lone = [x.first for x in whole if '"' in "".join(x.fields) and '""' not in lines[x.first - 1]]
    if odd and (lone or not quotes):
        where = ", ".join(f"{x.first} to {x.last}" for x in odd[:_FAULTS_SHOWN])
        more = f"; line {lone[0]} has a quote that is none of CSV's" if lone else ""
        raise DataError(
            f"{path}: lines {where}{', ...' if len(odd) > _FAULTS_SHOWN else ''}: quotes make one "
            f"row of them, but without quotes each line is a row{more}; quote every value, or save "
            "the file as .tsv or .jsonl"
        )


def _add(path: Path, records: Sequence[_Record], columns: Columns) -> None:
    if not records:
        raise DataError(f"{path}: expected a line of column names, found an empty file")
    names = records[0].fields
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: line 1: expected each column once, found {twice} again")
    odd = [record for record in records if len(record.fields) != len(names)]
    if odd:
        faults = [f"line {x.first}: found {len(x.fields)} value(s)" for x in odd[:_FAULTS_SHOWN]]
        faults += [f"and {len(odd) - _FAULTS_SHOWN} more"] if len(odd) > _FAULTS_SHOWN else []
        raise DataError(f"{path}: expected {len(names)} values in every line", faults)
    values = zip(*(record.fields for record in records), strict=True)
    # An empty place between two separators says nothing.
    columns.add_columns({x[0]: [y or None for y in x[1:]] for x in values}, len(records) - 1)
