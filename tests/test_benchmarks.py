"""The benchmarks that `make` starts run, at a tiny size."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from fedexlora.rounds.recipe import parse_recipe
from tests.rounds.conftest import recipe_document, save_rows

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def server(monkeypatch):
    """`benchmarks/server.py`, whose memory is measured in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    server, memory = (importlib.import_module(name) for name in ("server", "server_memory"))

    def here(name):
        monkeypatch.setattr(memory, "peak_of", lambda *words: memory.peak(*map(str, words)))
        return list(memory.measure_memory(memory.SIZES[name]))

    monkeypatch.setattr(server, "measure_memory", here)
    return server


def test_the_servers_benchmark_has_all_its_tables(server):
    found = server.measure("quick", repeats=2)
    assert [row["shape"] for row in found["steps"]] == [[96, 64], [128, 96]]
    for row in found["steps"]:
        assert row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
        assert sum(row["shares"].values()) == pytest.approx(1.0, abs=0.2)
        assert row["faster"]["median"] > 0 < row["faster_in_place"]["median"]
    assert found["truncation"]["faster"] > 0
    assert len(found["memory"]) == 5
    assert all(row["peak"] >= row["work"] for row in found["memory"])
    step, cut, peaks = server.tables(found)
    assert [column.header for column in step.columns[:3]] == ["module", "K", "r"]
    assert "recipe / ours" in [column.header for column in step.columns]
    assert [step.row_count, cut.row_count, peaks.row_count] == [2, 1, 5]


def test_the_profile_of_local_training_adds_up(bert, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    profile = importlib.import_module("local_training")
    document = recipe_document(bert, save_rows(tmp_path))
    document["partition"] = {"kind": "iid", "clients": 1}
    found = profile.measure(parse_recipe(document, "profile"), turns=1)
    assert found["rows"] == 36
    assert found["share"] > 0
    for ms in found["ms_a_step"].values():
        assert min(ms["forward"], ms["backward"], ms["optimizer"], ms["batches"]) > 0
        assert sum(ms.values()) == pytest.approx(2 * ms["all"])
    assert profile.table(found).row_count == len(found["ms_a_step"]["ours"])


def test_the_page_on_scale_has_the_sizes_as_they_are_computed(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    importlib.import_module("scale").sizes()
    rows = [row for row in capsys.readouterr().out.splitlines() if not row.startswith("| mod")]
    page = (FOLDER.parent / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 15
    assert set(rows) <= set(page)
