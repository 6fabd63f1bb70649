import json
import shutil

import pytest

from fedexlora.data.config import DataConfig
from fedexlora.data.load import load_splits
from fedexlora.errors import DataError

ROWS = [{"text": f"row {i}", "label": str(i % 3)} for i in range(40)]


def error_of(config):
    with pytest.raises(DataError) as caught:
        load_splits(config, 0)
    return str(caught.value)


def test_rows_keep_their_order_and_columns(write):
    write("train.jsonl", ROWS)
    folder = write("dev.jsonl", ROWS[:7])
    found = load_splits(DataConfig(source=str(folder), validation="dev.jsonl"), 0)
    assert found.train.to_list() == ROWS
    assert found.validation.to_list() == ROWS[:7]


def test_every_format_gives_the_same_rows_and_fingerprint(write):
    write("a.jsonl", ROWS)
    write("b.json", json.dumps(ROWS))
    write("c.csv", "label,text\n" + "".join(f"{x['label']},{x['text']}\n" for x in ROWS))
    folder = write("d.tsv", "text\tlabel\n" + "".join(f"{x['text']}\t{x['label']}\n" for x in ROWS))
    whole = load_splits(DataConfig(source=str(folder), train="a", validation="a"), 0)
    whole.train.to_parquet(folder / "e.parquet")
    for name in "bcde":
        config = DataConfig(source=str(folder), train=name, validation=name)
        assert load_splits(config, 0).fingerprint == whole.fingerprint


def test_a_missing_value_is_not_a_word(write):
    folder = write("train.csv", "text,label\nNA,1\nnull,2\n,3\n")
    config = DataConfig(source=str(folder), validation="train")
    assert load_splits(config, 0).train["text"][:] == ["NA", "null", None]


def test_the_fingerprint_follows_the_rows_not_the_folder(write, tmp_path):
    write("train.jsonl", ROWS)
    folder = write("validation.jsonl", ROWS)
    first = load_splits(DataConfig(source=str(folder)), 0).fingerprint
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        shutil.copy(folder / name, moved / name)
    assert load_splits(DataConfig(source=str(moved)), 0).fingerprint == first
    (moved / "validation.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1])))
    assert load_splits(DataConfig(source=str(moved)), 0).fingerprint != first


def test_a_subset_is_seeded_ordered_and_not_nested_in_the_seed(write):
    folder = write("train.jsonl", ROWS)
    config = DataConfig(
        source=str(folder), validation="train", max_train_rows=9, max_validation_rows=9
    )
    once, again, other = (load_splits(config, seed) for seed in (3, 3, 4))
    texts = once.train["text"][:]
    assert len(set(texts)) == 9
    assert texts == sorted(texts, key=lambda x: int(x.split()[1]))
    assert once.train.to_list() == again.train.to_list()
    assert once.train.to_list() != other.train.to_list()
    assert once.train.to_list() != once.validation.to_list()


def test_a_limit_above_the_size_keeps_all_rows(write):
    folder = write("train.jsonl", ROWS)
    config = DataConfig(source=str(folder), validation="train", max_train_rows=1000)
    assert len(load_splits(config, 0).train) == len(ROWS)


def test_both_missing_files_are_named(write):
    message = error_of(DataConfig(source=str(write("test.jsonl", ROWS))))
    assert "one file train{.jsonl" in message
    assert "one file validation{.jsonl" in message
    assert message.count("found test.jsonl") == 2


def test_two_files_of_one_name_are_ambiguous(write):
    write("train.jsonl", ROWS)
    folder = write("train.csv", "text\nx\n")
    message = error_of(DataConfig(source=str(folder), validation="train.csv"))
    assert "expected exactly one file" in message
    assert "found train.csv, train.jsonl" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"a": 1}\n{"a": \n', "train.jsonl: line 2: expected a JSON object"),
        ("train.jsonl", "", "train.jsonl: "),
        ("train.jsonl", "\n\n", "train.jsonl: "),
        ("train.json", "[]", "train.json"),
        ("train.csv", "a,b\n", "train.csv: "),
        ("train.csv", "", "train.csv: expected a line of column names"),
        ("train.csv", "a,b\n1,2\n1,2,3\n", "line 3: found 3 value(s)"),
        ("train.parquet", "no parquet", "train.parquet: "),
    ],
)
def test_an_unreadable_file_is_named(write, name, content, message):
    folder = write(name, content)
    assert message in error_of(DataConfig(source=str(folder), validation="train"))


def test_what_is_not_utf8_is_found_by_line(write, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n')
    message = error_of(DataConfig(source=str(tmp_path), validation="train"))
    assert "train.jsonl: line 2" in message


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(source):
    assert "expected a folder" in error_of(DataConfig(source=source))


def test_a_file_is_no_folder(write):
    file = write("train.jsonl", ROWS) / "train.jsonl"
    assert "found a file" in error_of(DataConfig(source=str(file)))


def test_an_unreachable_hub_says_how_to_go_without(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'glue' on the Hub")

    monkeypatch.setattr("fedexlora.data.source.load_dataset", refuse)
    message = error_of(DataConfig(source="glue", config="cola"))
    assert "'glue/cola' from the hub: Couldn't reach" in message
    assert "set `source` to a folder with train.jsonl" in message


def test_real_splits_have_the_official_sizes(real_data):
    found = load_splits(DataConfig(source=str(real_data / "rte")), 0)
    assert (len(found.train), len(found.validation)) == (2490, 277)
