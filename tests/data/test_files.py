"""Where a split's rows are found, whatever form they are in; and what is refused."""

import bz2
import gzip
import json
import lzma
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from fedexlora.data.config import DataConfig
from fedexlora.data.load import load_splits
from fedexlora.data.partition import split_clients
from fedexlora.data.partition_config import ByColumnPartition
from fedexlora.data.source import read_split
from fedexlora.errors import DataError

ROWS = [{"text": f"row {i} ü", "label": "xy"[i % 2]} for i in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(folder, split="train"):
    return read_split(DataConfig(source=str(folder)), split)


def error_of(folder, split="train"):
    with pytest.raises(DataError) as caught:
        read(folder, split)
    return str(caught.value)


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_files_are_read_by_any_of_their_names(suffix, tmp_path):
    (tmp_path / f"train.jsonl.{suffix}").write_bytes(COMPRESSED[suffix](LINES.encode()))
    for name in ("train", f"train.jsonl.{suffix}"):
        assert read(tmp_path, name).to_list() == ROWS


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_damaged_compressed_file_is_named(suffix, tmp_path):
    whole = COMPRESSED[suffix](LINES.encode())
    for content in (whole[: len(whole) // 2], b"no such thing", b""):
        (tmp_path / f"train.jsonl.{suffix}").write_bytes(content)
        assert f"train.jsonl.{suffix}: " in error_of(tmp_path)


@pytest.mark.parametrize("suffix", ["JSONL", "Jsonl", "ndjson", "json"])
def test_a_suffix_may_be_written_otherwise(suffix, tmp_path):
    (tmp_path / f"train.{suffix}").write_text(LINES, encoding="utf-8")
    assert read(tmp_path).to_list() == ROWS


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002", "train-00001-of-00002"),
        ("train-00000-of-00002-0123456789abcdef", "train-00001-of-00002-fedcba9876543210"),
        ("train_2", "train_10"),
        ("train/0000", "train/0001"),
        ("data/train-00000-of-00002", "data/train-00001-of-00002"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_parts_are_put_together_in_the_order_of_their_numbers(names, kind, tmp_path):
    for name, part in zip(names, (ROWS[:4], ROWS[4:]), strict=True):
        path = tmp_path / f"{name}.{kind}"
        path.parent.mkdir(exist_ok=True)
        rows = Dataset.from_list(part)
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
        else:
            (rows.to_csv if kind == "csv" else rows.to_parquet)(path)
    assert read(tmp_path).to_list() == ROWS


def test_a_pattern_names_files(tmp_path):
    for i, row in enumerate(ROWS):
        (tmp_path / f"part{i}.jsonl").write_text(json.dumps(row))
    assert read(tmp_path, "part[0-3].jsonl").to_list() == ROWS[:4]
    assert "expected exactly one file none*.jsonl" in error_of(tmp_path, "none*.jsonl")
    for split in ("../*.jsonl", "/tmp/*.jsonl", "../train", str(tmp_path / "part0.jsonl")):
        assert "leads out of" in error_of(tmp_path, split)


def test_a_missing_part_is_named(tmp_path):
    for i in (0, 2):
        (tmp_path / f"train-0000{i}-of-00003.jsonl").write_text(LINES)
    message = error_of(tmp_path)
    assert "each of the 3 parts of 'train' once" in message
    assert "missing: 1" in message


def test_what_could_be_meant_twice_is_refused(tmp_path):
    (tmp_path / "train-00000-of-00001.jsonl").write_text(LINES)
    (tmp_path / "train.jsonl").write_text(LINES)
    assert "found train.jsonl, train-00000-of-00001.jsonl" in error_of(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train-00001-of-00001.csv").write_text("text\nx\n")
    assert "train-00001-of-00001.csv" in error_of(tmp_path, "train-*")


def test_another_files_number_makes_it_no_part(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "train2.jsonl").write_text("{}")
    (tmp_path / "train-extra.jsonl").write_text("{}")
    assert read(tmp_path).to_list() == ROWS


def test_other_files_are_listed_and_hidden_ones_passed_over(tmp_path):
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "._train.jsonl").write_bytes(b"\x00")
    assert "found ._train.jsonl, train.txt" in error_of(tmp_path)
    (tmp_path / "train.jsonl").write_text(LINES)
    assert len(read(tmp_path)) == 6


def test_saved_data_sets_are_read_where_they_lie(tmp_path):
    rows = Dataset.from_list(ROWS).cast_column("label", ClassLabel(names=["y", "x"]))
    DatasetDict(train=rows, dev=rows.select([0, 3])).save_to_disk(str(tmp_path / "both"))
    assert read(tmp_path / "both").features["label"].names == ["y", "x"]
    assert len(read(tmp_path / "both", "dev")) == 2
    assert "both: expected exactly one file test{" in error_of(tmp_path / "both", "test")
    assert "one saved data set" in error_of(tmp_path / "both" / "train")
    (tmp_path / "both" / "dev" / "dataset_info.json").unlink()
    assert "dev: no whole saved data set" in error_of(tmp_path / "both", "dev")


def test_categories_and_views_of_text_are_text(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["a", "b"]).cast(pa.string_view()),
            "label": pa.array(["x", "y"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    assert read(tmp_path).to_list() == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


def test_parts_with_other_label_names_are_refused(tmp_path):
    for part, names in enumerate((["x", "y"], ["y", "x"])):
        rows = Dataset.from_list(ROWS).cast_column("label", ClassLabel(names=names))
        rows.to_parquet(tmp_path / f"train-0000{part}-of-00002.parquet")
    assert "the columns of train-00000-of-00002.parquet to" in error_of(tmp_path)


def test_what_is_read_is_what_is_on_disk(tmp_path):
    for word in ("old", "new", "two"):
        path = tmp_path / "train.jsonl"
        path.write_text(json.dumps({"text": word}))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert read(tmp_path)["text"][:] == [word]


def test_local_rows_are_written_nowhere(tmp_path, monkeypatch):
    folder, cache = tmp_path / "rows", tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    canary = "qwertyuiopasdfgh"
    table = {"text": [f"{canary} {i}" for i in range(20)], "site": [f"s{i % 3}" for i in range(20)]}
    Dataset.from_dict(table).to_csv(folder / "train.csv")
    Dataset.from_dict(table).to_parquet(folder / "validation.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    found = load_splits(DataConfig(source=str(folder), max_train_rows=12), 0)
    split_clients(found.train, ByColumnPartition(column="site"), default_column=None, seed=0)
    written = [x for x in tmp_path.rglob("*") if x.is_file() and x.parent != folder]
    assert not [x for x in written if canary.encode() in x.read_bytes()]
    assert found.train.cache_files == found.validation.cache_files == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(blocked / "cache"))

    def load(*args, **kwargs):
        raise OSError("whatever the library makes of it")

    monkeypatch.setattr("fedexlora.data.source.load_dataset", load)
    with pytest.raises(DataError) as caught:
        read_split(DataConfig(source="glue", config="cola"), "train")
    assert (
        f"cache of data sets from the hub cannot be written: {blocked}/cache: Not a directory"
        in str(caught.value)
    )
    assert "HF_HOME" in str(caught.value)
