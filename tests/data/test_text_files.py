"""CSV, TSV and JSON: every value as it is written, or the line that is wrong."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedexlora.data.columns import Columns
from fedexlora.data.config import DataConfig
from fedexlora.data.csv_rows import add_csv, add_tsv
from fedexlora.data.json_rows import add_json, add_json_lines
from fedexlora.data.source import read_split
from fedexlora.errors import DataError

HERE = Path("train")
ODD = 'text,label\r\n"a, comma",a\r\n"a ""quoted"" word",b\r\n"two\nlines",a\r\nNA,b\r\n,b\r\n'
READ = ["a, comma", 'a "quoted" word', "two\nlines", "NA", None]


def rows_of(text, add):
    columns = Columns()
    columns.begin(HERE)
    add(HERE, text, columns)
    return columns.table().to_pylist()


def error_of(text, add):
    with pytest.raises(DataError) as caught:
        rows_of(text, add)
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_is_read_in_any_of_its_dialects(encoding, delimiter, tmp_path):
    text = ODD.replace(",", delimiter)
    (tmp_path / "train.csv").write_bytes(text.encode(encoding))
    rows = read_split(DataConfig(source=str(tmp_path)), "train")
    assert rows["text"][:] == [x and x.replace(",", delimiter) for x in READ]
    assert rows["label"][:] == ["a", "b", "a", "b", "b"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "tsv"])
def test_a_byte_order_mark_is_no_part_of_the_text(suffix, tmp_path):
    text = "text\nü\n" if suffix == "tsv" else '{"text": "ü"}'
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / f"train.{suffix}").write_bytes(text.encode(encoding))
        rows = read_split(DataConfig(source=str(tmp_path)), "train")
        assert rows.to_list() == [{"text": "ü"}]


def test_utf16_without_a_mark_is_refused_by_line(tmp_path):
    (tmp_path / "train.csv").write_bytes("text\nu\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"train.csv: line 1: expected UTF-8, found a zero byte"):
        read_split(DataConfig(source=str(tmp_path)), "train")


def test_a_column_is_text_whatever_its_values_look_like():
    values = ["007", "1.0", "1e5", "2020-01-01", "NA", "nan", "None", "True", " x ", "-1", "½"]
    expected = [{"n": x, "o": "1"} for x in values]
    assert rows_of("n\to\n" + "".join(f"{x}\t1\n" for x in values), add_tsv) == expected
    assert rows_of("n,o\n" + "".join(f"{x},1\n" for x in values), add_csv) == expected
    lines = "".join(json.dumps({"n": x, "o": "1"}) + "\n" for x in values)
    assert rows_of(lines, add_json_lines) == expected


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")
    | st.sampled_from('",\n; \t'),
    min_size=1,
    max_size=12,
)
TABLES = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)


@given(TABLES, st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writers_quote_comes_back(table, delimiter, end):
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *table])
    text = written.getvalue()
    if delimiter != ",":
        text = text.replace('"a"', "a", 1)
    assert rows_of(text, add_csv) == [{"a": a, "b": b} for a, b in table]


@given(TABLES)
def test_a_sparing_csv_writer_is_read_or_refused_but_never_misread(table):
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([("a", "b"), *table])
    try:
        found = rows_of(written.getvalue(), add_csv)
    except DataError as error:
        assert "quotes make one row of them" in str(error)  # noqa: PT017 - either may come
    else:
        assert found == [{"a": a, "b": b} for a, b in table]


NAIVE = st.lists(st.text('ab" ', min_size=1, max_size=6), min_size=1, max_size=8)


@given(NAIVE)
@settings(max_examples=300)
def test_rows_that_were_written_without_quoting_never_melt(texts):
    text = "text,label\n" + "".join(f"{x},y\n" for x in texts)
    try:
        found = rows_of(text, add_csv)
    except DataError as error:
        assert "line" in str(error)  # noqa: PT017 - either may come
    else:
        assert len(found) == len(texts)


@given(st.lists(st.text('ab"\u2028\x85\x0b ', min_size=1, max_size=6), min_size=1, max_size=8))
def test_a_tsv_has_no_quotes(texts):
    quotes = [x for x in texts if '"' in x]
    assume(not any('""' in x for x in quotes))
    found = rows_of("text\tlabel\n" + "".join(f"{x}\ty\n" for x in texts), add_tsv)
    assert found == [{"text": x, "label": "y"} for x in texts]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('t,l\nx,a\n"Never,a\nno,b\n', "line 3: its quotes are not those of CSV (unexpected end"),
        ('t,l\n"Never,a\nagain" he said,b\n', "line 2: its quotes are not those of CSV"),
        ('t,l\nx,a\n"Never,a\nagain",b\nx,a\n', "lines 3 to 4: quotes make one row of them"),
        ('t,l\n"a, b",a\nit 5" is,a\n"Never,a\nagain",b\n', "lines 4 to 5: quotes make one row"),
        ("t,l\nx,a\nx,a,b\nx\n", "expected 2 values in every line\n  line 3: found 3 value(s)"),
        ("t,t\nx,a\n", "line 1: expected each column once, found ['t']"),
        ("t;l\tm\nx;a\n", "separated by semicolons and tabs"),
        ("", "expected a line of column names"),
    ],
)
def test_a_csv_that_is_none_is_refused_by_line(text, message):
    assert message in error_of(text, add_csv)


def test_a_quoted_tsv_is_refused_and_read_as_csv():
    text = 't\tl\n"he said ""no"""\ta\nx\tb\n'
    assert "name the file .csv" in error_of(text, add_tsv)
    assert rows_of(text, add_csv)[0] == {"t": 'he said "no"', "l": "a"}


def test_a_tsv_row_of_another_length_is_refused_by_line():
    assert "line 3: found 1 value(s)" in error_of(
        "a\tb\n1\t2\n\n".replace("\n\n", "\n3\n"), add_tsv
    )


def test_long_values_are_read_and_the_limit_of_others_stays():
    before = csv.field_size_limit()
    assert rows_of(f"a\n{'x' * 200_000}\n", add_csv) == [{"a": "x" * 200_000}]
    assert csv.field_size_limit() == before


VALUES = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(st.lists(st.fixed_dictionaries({"a": VALUES, "b": VALUES}), min_size=1, max_size=6))
def test_every_form_of_json_gives_the_same_rows(rows):
    lines = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows)
    assert rows_of(lines, add_json_lines) == rows
    columns = {key: [x[key] for x in rows] for key in "ab"}
    forms = (rows, {"version": 1, "data": rows}, columns)
    for form in forms:
        assert rows_of(json.dumps(form, indent=1), add_json) == rows
    assert rows_of(lines.rstrip() + "\n\n", add_json if len(rows) > 1 else add_json_lines) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": {"a": 1}, "1": {"a": 2}}', "found an object of '0', '1' with none"),
        ('{"x": [{"a": 1}], "y": [{"a": 1}]}', "of 'x', 'y' with 2 lists of objects"),
        ("[1, 2]", "row 1: expected a JSON object, found int"),
        ("3", "expected a list of objects, found int"),
        ('[{"a": 1},', "expected JSON, found"),
        ('{"a": 1}\n{"a": \n', "line 2: expected a JSON object"),
        ('{"a": 1}\n[1]\n', "line 2: expected a JSON object, found list"),
        ('[{"a": "x"}, {"b": 1}, {"a": 5}]', "as in row 1; found a number in row 3"),
        ('[{"a": 1}, {"a": true}]', "expected a number in every row, as in row 1; found a boolean"),
        ('[{"a": 1}, {"a": 18446744073709551616}]', "found 18446744073709551616 in row 2"),
        ('[{"a": "x"}, {"a": "\\ud800"}]', "half a surrogate pair in row 2"),
    ],
)
def test_json_that_is_no_table_is_refused_by_row(text, message):
    assert message in error_of(text, add_json)


def test_a_row_of_a_later_file_is_named_by_that_file():
    columns = Columns()
    for name, value in (("a.jsonl", "x"), ("b.jsonl", 1)):
        columns.begin(Path(name))
        columns.add_row({"t": value})
    with pytest.raises(DataError, match=r"as in row 1 of a.jsonl; found a number in row 1 of b"):
        columns.table()


def test_keys_that_some_rows_lack_have_no_value_there():
    assert rows_of('{"a": 1}\n{"b": 2.5}\n', add_json_lines) == [
        {"a": 1, "b": None},
        {"a": None, "b": 2.5},
    ]


@pytest.mark.parametrize("odd", [[{"content": 5}], [{"content": ["x"]}], ["x"], [[{}]]])
def test_the_row_of_a_list_with_other_parts_is_named(odd):
    rows = [{"messages": [{"content": "x"}]}] * 5 + [{"messages": odd}, {"messages": []}]
    with pytest.raises(DataError, match="'messages': expected values of one form, .* in row 6: "):
        rows_of("\n".join(map(json.dumps, rows)), add_json_lines)
