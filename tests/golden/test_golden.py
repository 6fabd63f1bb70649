"""Records of today's runs are those of yesterday's: what should not move numbers does not."""

from __future__ import annotations

import copy

import pytest

from tests.golden.federations import FEDERATIONS, Bases, play
from tests.golden.figures import bytes_moved, differences
from tests.golden.write import FOLDER, faults, golden


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Bases:
    return Bases(tmp_path_factory.mktemp("golden"))


def test_every_federation_has_its_file():
    assert {path.stem for path in FOLDER.glob("*.json")} >= FEDERATIONS.keys()


@pytest.mark.parametrize("name", FEDERATIONS)
def test_a_federation_has_its_golden_records(bases, name):
    found = play(bases.recipe(name))
    assert not faults(name, found)
    assert bytes_moved(found["rounds"]) == golden(name)["bytes"], (
        "if it is meant: write them, --bytes"
    )


def test_a_difference_is_found():
    stored = golden("mean")
    for change in (
        lambda r: r["modules"][0].update(ideal=r["modules"][0]["ideal"] * (1 + 2e-9)),
        lambda r: r["modules"][1].update(error=3e-6),
        lambda r: r["clients"][0].update(client="somebody"),
        lambda r: r["metrics"].update(loss=r["metrics"]["loss"] + 1e-2),
        lambda r: r["clients"].pop(),
    ):
        spoiled = copy.deepcopy(stored)
        change(spoiled["rounds"][1])
        assert len(differences(spoiled, stored)) >= 1
    spoiled = copy.deepcopy(stored)
    next(iter(spoiled["adapter"].values()))[1] += 1e-3
    assert len(differences(spoiled, stored)) == 1
