import re
import warnings

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexlora.data.config import DataConfig
from fedexlora.data.load import load_splits
from fedexlora.data.partition import client_values, split_clients
from fedexlora.data.partition_config import (
    ByColumnPartition,
    DirichletPartition,
    IidPartition,
)
from fedexlora.errors import DataError
from fedexlora.exchange.untrusted import CLIENT_NAME

TRAIN = Dataset.from_dict(
    {
        "row": list(range(300)),
        "label": [i % 3 for i in range(300)],
        "score": [i / 7 for i in range(300)],
        "name": [["Lady B", "lady-b", "Zoë!", "", "c/../d"][i % 5] for i in range(300)],
        "holes": [None if i % 9 == 4 else "x" for i in range(300)],
    }
)
PARTITIONS = {
    "iid": IidPartition(clients=7),
    "dirichlet": DirichletPartition(clients=7, alpha=0.5),
    "dirichlet-text": DirichletPartition(clients=4, alpha=0.5, column="name", min_rows=5),
    "by_column": ByColumnPartition(column="name"),
}


def split(partition, train=TRAIN, seed=0, column="label"):
    shares = split_clients(train, partition, default_column=column, seed=seed)
    return {name: train.select(rows) for name, rows in shares.items()}


def rows(shares):
    return {name: share["row"][:] for name, share in shares.items()}


def error_of(partition, **options):
    with pytest.raises(DataError) as caught:
        split(partition, **options)
    return str(caught.value)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_every_row_has_exactly_one_client(kind):
    shares = rows(split(PARTITIONS[kind]))
    assert sorted(x for share in shares.values() for x in share) == list(range(300))
    assert all(shares.values())
    assert list(shares) == sorted(shares)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_rows_are_handed_over_whole(kind):
    for share in split(PARTITIONS[kind]).values():
        assert share.to_list() == [TRAIN[i] for i in share["row"]]


@pytest.mark.parametrize("kind", PARTITIONS)
def test_the_same_seed_gives_the_same_rows_in_the_same_order(kind):
    assert rows(split(PARTITIONS[kind], seed=5)) == rows(split(PARTITIONS[kind], seed=5))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "dirichlet-text"])
def test_another_seed_gives_another_division(kind):
    assert rows(split(PARTITIONS[kind], seed=5)) != rows(split(PARTITIONS[kind], seed=6))


def test_a_subset_is_divided_like_a_table_of_its_own():
    chosen = TRAIN.select(range(0, 300, 2))
    for kind in PARTITIONS:
        shares = rows(split(PARTITIONS[kind], train=chosen))
        assert sorted(x for share in shares.values() for x in share) == list(range(0, 300, 2))


def test_iid_shares_are_equal_and_shuffled():
    shares = rows(split(IidPartition(clients=7)))
    assert {len(share) for share in shares.values()} == {42, 43}
    assert all(share != sorted(share) for share in shares.values())


def test_a_small_alpha_divides_labels_less_evenly():
    def unevenness(alpha):
        shares = split(DirichletPartition(clients=6, alpha=alpha)).values()
        counts = np.array([np.bincount(share["label"], minlength=3) for share in shares])
        return float((counts / counts.sum(axis=1, keepdims=True)).std(axis=0).mean())

    assert unevenness(0.1) > 3 * unevenness(100.0)


def test_dirichlet_gives_everyone_the_fewest_rows_or_more():
    shares = split(DirichletPartition(clients=5, alpha=0.5, min_rows=20))
    assert min(map(len, shares.values())) >= 20


def test_a_draw_that_is_repeated_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(5):
            split(DirichletPartition(clients=5, alpha=0.3, min_rows=15), seed=seed)


def test_named_labels_can_be_divided_by():
    features = Features({"row": Value("int64"), "label": ClassLabel(names=["a", "b", "c"])})
    train = TRAIN.select_columns(["row", "label"]).cast(features)
    shares = rows(split(DirichletPartition(clients=3, alpha=1.0), train=train))
    assert sorted(x for share in shares.values() for x in share) == list(range(300))


def test_clients_of_a_column_have_safe_and_different_names():
    shares = split(ByColumnPartition(column="name"))
    assert set(shares) == {"lady-b-1", "lady-b-2", "zoe", "name-1", "c-d"}
    assert {share["name"][0] for share in shares.values()} == set(TRAIN["name"])
    assert all(len(set(share["name"])) == 1 for share in shares.values())
    assert shares["zoe"]["row"][:] == list(range(2, 300, 5))


def test_a_number_after_a_name_never_takes_another_name():
    names = ["a b", "a-b", "a b 1", "A B"]
    train = Dataset.from_dict({"name": names, "row": range(4)})
    shares = split(ByColumnPartition(column="name"), train=train)
    assert set(shares) == {"a-b-1", "a-b-2", "a-b-3", "a-b-4"}
    assert shares["a-b-1"]["name"][:] == ["a b 1"]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (
            ["Łódź", "Tromsø", "Straße", "Ærø", "İzmir", "naïve"],
            ["aero", "izmir", "lodz", "naive", "strase", "tromso"],
        ),
        (["東京", "北京", "東京 East"], ["east", "site-1", "site-2"]),
        (["Москва", "site 1", ""], ["site-1", "site-2", "site-3"]),
        (["München", "Munchen", "munchen-1"], ["munchen-1", "munchen-2", "munchen-3"]),
        (["-", "..", "/"], ["site-1", "site-2", "site-3"]),
    ],
)
def test_names_of_other_scripts_are_legible_and_a_record_says_whose_they_are(values, names):
    train = Dataset.from_dict({"site": values})
    partition = ByColumnPartition(column="site")
    shares = split_clients(train, partition, default_column=None, seed=0)
    assert list(shares) == names
    found = client_values(train, partition, shares)
    assert {name: values[rows[0]] for name, rows in shares.items()} == found
    assert client_values(train, IidPartition(clients=1), {"client-00": range(3)}) == {}


@given(st.lists(st.text(max_size=80), min_size=1, max_size=6, unique=True))
@settings(max_examples=25, deadline=None)
def test_every_value_has_a_name_of_the_alphabet_of_clients(values):
    values = [x.encode("utf-8", "ignore").decode() for x in values]
    train = Dataset.from_dict({"site": values})
    partition = ByColumnPartition(column="病院")
    shares = split_clients(
        train.rename_column("site", "病院"), partition, default_column=None, seed=0
    )
    assert len(shares) == len(set(values))
    assert all(re.fullmatch(CLIENT_NAME, name) for name in shares)


def test_numbers_are_as_wide_as_the_last_one():
    assert list(split(IidPartition(clients=2))) == ["client-00", "client-01"]
    assert list(split(IidPartition(clients=101)))[::100] == ["client-000", "client-100"]


def test_more_clients_than_rows_names_those_without():
    few = TRAIN.select(range(3))
    for partition in (IidPartition(clients=5), DirichletPartition(clients=5, alpha=1.0)):
        message = error_of(partition, train=few)
        assert "3 training rows are too few for 5 clients" in message
        assert "(client-03, client-04); use fewer clients" in message


def test_a_division_that_is_never_drawn_says_what_to_change():
    message = error_of(DirichletPartition(clients=90, alpha=0.01))
    assert "among 90 clients with at least 1 row(s) each at alpha = 0.01" in message
    assert "raise partition.alpha, or lower partition.clients" in message


@pytest.mark.parametrize(
    ("partition", "column", "message"),
    [
        (ByColumnPartition(column="who"), None, "no column 'who'; they have row, label"),
        (DirichletPartition(clients=2, alpha=1, column="who"), None, "no column 'who'"),
        (DirichletPartition(clients=2, alpha=1), None, "needs the column to divide by, one of row"),
        (DirichletPartition(clients=2, alpha=1), "score", "found float64; name a column of labels"),
        (ByColumnPartition(column="score"), None, "found float64"),
        (ByColumnPartition(column="holes"), None, "found none in 33 of 300"),
    ],
)
def test_a_column_that_cannot_be_divided_by_is_refused(partition, column, message):
    assert message in error_of(partition, column=column)


def test_speeches_of_shakespeare_belong_to_their_speakers(real_data):
    train = load_splits(DataConfig(source=str(real_data / "shakespeare")), 0).train
    shares = split(ByColumnPartition(column="role"), train=train)
    assert sum(map(len, shares.values())) == len(train) == 25886
    assert len(shares) == len(set(train["role"]))
