"""The report's page: what is in it, how it is told apart from what is not, and its size."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedexlora.cli.report import add_report
from fedexlora.errors import InputError
from fedexlora.exchange.comparison_records import ComparisonRecord
from fedexlora.report.page import LARGEST, write_report
from fedexlora.report.run_set import read_runs
from tests.cli.invoke import fedexlora
from tests.report.runs import CLIENTS, record, write_run

SECTIONS = ("what", "curves", "deviation", "certificate", "cost", "clients", "environment", "again")
HOSTILE = "<script>alert(1)</script>\"'&$\\frac{$ \u202e"


class Page(HTMLParser):
    """The tags of a page, its texts, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "section":
            self.sections.append(found["id"])
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and value[:1] != "#":
                self.fetched.append(value[:10])
            assert not name.startswith("on")

    def handle_data(self, data):
        self.words.append(data)


def page(folders, out, **options) -> Page:
    write_report(folders, out, **options)
    assert out.stat().st_size < LARGEST
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A folder with a run, its report and its figures."""
    folder = tmp_path_factory.mktemp("alone")
    write_run(folder / "run", clients=("=cmd()", "site-south", "site-west"))
    write_report([folder / "run"], folder / "report.html", folder / "figures")
    return folder


def test_the_report_of_a_run_has_every_section_and_asks_nobody_for_anything(alone):
    found = Page((alone / "report.html").read_text(encoding="utf-8"))
    assert tuple(found.sections) == SECTIONS
    assert "script" not in found.tags
    assert {x.split(":")[0] for x in found.fetched} <= {"data"}
    assert found.tags.count("svg") >= 12
    words = " ".join(found.words)
    for said in ("it was too late", "site-west", "torch==2.9.0", "fedexlora run", "3 of 3 rounds"):
        assert said in words


def test_every_figure_has_a_role_a_description_and_its_numbers(alone):
    text = (alone / "report.html").read_text(encoding="utf-8")
    for figure in re.findall(r"<figure>.*?</figure>", text, re.DOTALL):
        assert re.search(r'<svg [^>]*role="img" aria-label="[^"]+"', figure)
        assert "<desc>" in figure
        assert "<details>" in figure
        assert "<tbody>" in figure
    assert "<text" in text, "text is text"
    assert "#0b62c4" not in text.split("</style>")[1], "every colour follows the reader's scheme"


def test_a_comparison_of_runs_has_means_spreads_and_pairs(tmp_path):
    folders = [
        write_run(tmp_path / f"{method}-{seed}", method, seed=seed)
        for method in ("fedit", "fedex")
        for seed in (0, 1, 2)
    ]
    words = " ".join(page(folders, tmp_path / "report.html").words)
    by = {
        m: [record(m, s, 3, 2, CLIENTS).metrics["accuracy"] for s in range(3)]
        for m in ("fedit", "fedex")
    }
    means = {m: sum(x) / 3 for m, x in by.items()}
    spreads = {m: (sum((y - means[m]) ** 2 for y in x) / 2) ** 0.5 for m, x in by.items()}
    for method in by:
        assert f"{means[method]:.4f} ± {spreads[method]:.4f}" in words
    pairs = [a - b for a, b in zip(by["fedex"], by["fedit"], strict=True)]
    assert f"{sum(pairs) / 3:+.4f} ±" in words
    assert "(3 seeds)" in words
    assert "fedexlora run recipe.toml" in words
    assert "--set federation.seed=2" in words


def test_everything_in_records_is_shown_as_text(tmp_path):
    folder = write_run(
        tmp_path / "run",
        recipe={"data": {"source": HOSTILE}, "model": {"source": HOSTILE}},
        header={"notes": [HOSTILE], "packages": {HOSTILE: "1; rm -rf /"}},
        clients=(HOSTILE, "b", "c"),
    )
    spoiled = (folder / "rounds.jsonl").read_text().replace("layer.0.", r"<img src=x onerror=y>.0.")
    (folder / "rounds.jsonl").write_text(spoiled)
    found = page([folder], tmp_path / "report.html")
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert "\u202e" not in found.text
    assert "rm -rf" not in next(line for line in found.words if line.startswith("pip install"))


def test_thirty_cells_with_all_sections_are_one_small_page(tmp_path):
    methods = ("fedit", "ffa", "fedex", "flora", "flexlora", "rolora", "fedsa", "fedsvd")
    methods += ("fedmomentum", "fedrot")
    folders = [
        write_run(tmp_path / f"{method}-{seed}", method, seed=seed, rounds=2)
        for method in methods
        for seed in range(3)
    ]
    found = page(folders, tmp_path / "report.html")
    assert set(found.sections) == {*SECTIONS, "comparison"}
    for method in methods:
        assert f"{method}, seed 2" in found.text


def test_a_long_run_of_a_large_model_is_a_small_page_and_says_what_it_leaves_out(tmp_path):
    folder = write_run(tmp_path / "run", rounds=450, layers=32)
    found = page([folder], tmp_path / "report.html", figures=tmp_path / "figures")
    assert "more rows are in the CSV files" in found.text
    rows = list(csv.reader((tmp_path / "figures" / "score.csv").open()))
    assert len(rows) == 452


def test_figures_are_files_too(alone):
    drawn = sorted((alone / "figures").glob("*.svg"))
    assert len(drawn) >= 12
    for path in drawn:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert root.tag.endswith("svg")
        assert "var(" not in path.read_text()
        assert path.with_suffix(".csv").exists()
    rows = list(csv.reader((alone / "figures" / "score.csv").open()))
    assert rows[0] == ["round", "fedex"]
    assert float(rows[3][1]) == record("fedex", 0, 2, 2, CLIENTS).metrics["accuracy"]


def test_a_cell_that_a_spreadsheet_would_run_is_text(alone):
    assert "'=cmd()" in (alone / "figures" / "table-clients-clients.csv").read_text()


def test_runs_of_other_data_or_versions_are_compared_and_the_difference_is_said(tmp_path):
    one = write_run(tmp_path / "a", "fedex")
    other = write_run(
        tmp_path / "b",
        "fedit",
        rounds=2,
        recipe={"training": {"learning_rate": 0.5}},
        header={"data": "e" * 64, "packages": {"torch": "2.10.0"}, "fedexlora": "0.2.0"},
    )
    text = " ".join(page([one, other], tmp_path / "report.html").words)
    before = text[: text.index("By arm")]
    for said in ("data: ddd", "torch: 2.9.0 in fedex", "fedexlora: 0.1.0 in fedex", "0.01, 0.5"):
        assert said in before
    assert "finished rounds: 3 in fedex; 2 in fedit" in before


def test_a_run_without_rounds_one_that_goes_on_and_one_that_is_cut_off_are_shown_as_such(tmp_path):
    empty = write_run(tmp_path / "empty", rounds=0, planned=3)
    short = write_run(tmp_path / "short", seed=1, rounds=1, planned=3)
    cut = write_run(tmp_path / "cut", seed=2)
    lines = (cut / "rounds.jsonl").read_bytes()
    (cut / "rounds.jsonl").write_bytes(lines[:-40])
    words = " ".join(page([empty, short, cut], tmp_path / "report.html").words)
    assert "fedex, seed 0: no finished round" in words
    assert "fedex, seed 1: 1 of 3 rounds" in words
    assert "2 of 3 rounds; the record of the round after is cut off" in words
    alone = page([empty], tmp_path / "alone.html")
    assert "There is no finished round" in " ".join(alone.words)
    (empty / "run.json").unlink()
    (empty / "rounds.jsonl").unlink()
    assert "no finished round" in " ".join(page([empty], tmp_path / "alone.html").words)


def test_what_is_no_run_or_is_damaged_is_refused_with_every_fault(tmp_path):
    (tmp_path / "other").mkdir()
    damaged = write_run(tmp_path / "damaged")
    lines = (damaged / "rounds.jsonl").read_text().splitlines()
    (damaged / "rounds.jsonl").write_text("\n".join([lines[0], '{"round": 2}', lines[2]]) + "\n")
    (damaged / "run.json").write_text("{")
    old = write_run(tmp_path / "old")
    content = (old / "rounds.jsonl").read_text()
    (old / "rounds.jsonl").write_text(content.replace('"schema_version":3', '"schema_version":2')
                                      .replace('"stay"', '"gone"'))  # fmt: skip
    with pytest.raises(InputError) as error:
        read_runs([tmp_path / "other", damaged, old])
    faults = "\n".join(error.value.faults)
    assert "no run's folder: recipe.toml: missing" in faults
    assert "rounds.jsonl, line 2:" in faults
    assert "run.json" in faults
    assert "a record of another fedexlora, in format 2; this one reads 3" in faults
    for folders in ([tmp_path / "nowhere"], [old, old]):
        with pytest.raises(InputError):
            read_runs(folders)


def test_older_records_lack_norms_and_have_a_report_without_them(tmp_path):
    found = page([write_run(tmp_path / "run", norms=False)], tmp_path / "report.html")
    assert tuple(found.sections) == SECTIONS
    assert "Size of the remainder" not in found.text


def test_scores_on_the_clients_own_rows_are_shown_by_client(tmp_path):
    folder = write_run(tmp_path / "run", header={"initial_metrics": {}})
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    totals = {"rows": 14, "targets": 14, "clients": 2, "mean_of_clients": {}}
    for version, line in enumerate(lines):
        line |= {
            "metrics": {},
            "scores": {**totals, "version": version, "pooled": {"accuracy": 0.1}},
        }
        line["clients"][0]["scores"] = {"rows": 7, "targets": 7, "metrics": {"accuracy": 0.0625}}
    (folder / "rounds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    clients = [
        {"client": name, "since": 2, "downloaded_bytes": 1, "uploaded_bytes": 1}
        | {"scores": {"rows": 7, "targets": 7, "metrics": {"accuracy": score}}}
        for name, score in (("site-north", 0.75), ("site-west", 0.25))
    ]
    finish = {
        "version": 3, "clients": clients, "left_out": [], "bytes": {"up": 2, "down": 2},
        "scores": {**totals, "version": 3, "pooled": {"accuracy": 0.5125}}, "seconds": 0.1,
    }  # fmt: skip
    (folder / "finish.json").write_text(json.dumps(finish))
    found = page([folder], tmp_path / "report.html")
    assert "own-rows" in found.sections
    words = " ".join(found.words)
    assert "accuracy by client" in words
    assert "0.7500" in words
    assert "0.0625" in words
    assert "last accuracy 0.5125" in re.sub(r"\s+", " ", words)


def test_a_run_that_ended_early_as_its_recipe_says_is_whole(tmp_path):
    folder = write_run(tmp_path / "run", rounds=2, planned=9)
    (folder / "adapter.json").write_text(json.dumps({"stopped": True, "version": 2}))
    run = read_runs([folder]).cells[0].run
    assert run.whole
    assert "ended early" in run.state


def test_a_report_that_cannot_be_drawn_is_said_and_loses_nothing(tmp_path, monkeypatch, capsys):
    def fails(*args: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("fedexlora.report.page.write_report", fails)
    assert add_report(tmp_path) is None
    said = capsys.readouterr()
    assert "no report: RuntimeError: no font" in said.err
    assert not said.out


def comparison(folder, cells) -> ComparisonRecord:
    statistic = {"mean": 0.7, "deviation": 0.02, "count": 2}
    arm = {
        "method": "fedex", "title": "FedEx-LoRA", "settings": {}, "seeds": (0, 1),
        "scores": {"accuracy": statistic}, "bytes_up": statistic, "bytes_down": statistic,
        "seconds": statistic, "target": None, "within_budget": statistic,
    }  # fmt: skip
    pair = {"mean": 0.03, "deviation": 0.01, "low": 0.02, "high": 0.04, "seeds": (0, 1)}
    return ComparisonRecord.model_validate({
        "fedexlora": "0.1.0", "recipe": "quickstart.toml",
        "command": "fedexlora compare quickstart.toml --methods fedex,fedit --out c",
        "rounds": 3, "headline": "accuracy", "lower_is_better": ("loss",), "seeds": (0, 1),
        "baseline": "fedit", "confidence": 0.95, "target": None, "budget": 5000, "same_start": (),
        "arms": [
            {**arm, "arm": "fedex", "differences": {"accuracy": pair}},
            {**arm, "arm": "fedit", "differences": {}},
        ],
        "cells": [
            {"arm": arm, "method": arm, "settings": {}, "curve": (), "seed": seed} | {
                "run": run, "hole": hole
            }
            for arm, seed, run, hole in cells
        ],
    })  # fmt: skip


def test_a_comparison_s_own_numbers_are_shown_and_its_holes(tmp_path):
    cells = [
        ("fedex", 0, "runs/fedex/seed-0", None),
        ("fedit", 0, "runs/fedit/seed-0", None),
        ("fedit", 1, "runs/fedit/seed-1", "exit code 1: out of memory"),
    ]
    for arm, seed, run, hole in cells:
        if hole is None:
            write_run(tmp_path / "c" / run, arm, seed=seed)
    record_ = comparison(tmp_path, cells)
    (tmp_path / "c" / "compare.json").write_text(record_.model_dump_json())
    words = " ".join(page([tmp_path / "c"], tmp_path / "report.html").words)
    assert "+0.0300 ± 0.0100 [+0.0200, +0.0400] (2 seeds)" in words
    assert "fedit, seed 1: exit code 1: out of memory" in words
    assert "95% bootstrap intervals" in words
    assert "fedexlora compare quickstart.toml" in words
    outside = comparison(tmp_path, [("fedex", 0, "../../etc", None)])
    (tmp_path / "c" / "compare.json").write_text(outside.model_dump_json())
    with pytest.raises(InputError, match="runs outside of its folder"):
        read_runs([tmp_path / "c"])


def test_the_command_writes_the_page_and_names_it(tmp_path):
    folder = write_run(tmp_path / "run")
    done = fedexlora("report", folder, "--out", tmp_path / "sub" / "r.html", "--figures",
                     tmp_path / "f")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "r.html" in done.stdout
    assert (tmp_path / "sub" / "r.html").exists()
    assert fedexlora("report", tmp_path, "--out", tmp_path / "x.html").returncode == 2
    assert not (tmp_path / "x.html").exists()


def test_the_deviation_of_runs_is_what_their_records_say(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", recipe={"training": {"num_train_epochs": 3}})
    done = fedexlora("deviation", one, two, "--plot", tmp_path / "d.svg", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wanted = record("fedex", 0, 2, 2, CLIENTS)
    second = found["runs"][0]["rounds"][1]
    assert second["deviation"] == wanted.deviation
    assert second["modules"] == {m.module: m.deviation for m in wanted.modules}
    values = [m for m in wanted.modules if m.module.endswith("query")]
    lost = sum((m.deviation * m.mean_product) ** 2 for m in values)
    whole = sum(m.mean_product**2 for m in values)
    assert second["projections"]["attention.query"] == pytest.approx((lost / whole) ** 0.5)
    size = (4 * 0.2**2) ** 0.5 / (4 * 3.0**2) ** 0.5
    assert second["remainder"] == pytest.approx(size)
    assert second["rank"] == 8
    assert [x["local_epochs"] for x in found["by_epochs"]] == [1.0, 3.0]
    assert "Round 1, by local epochs" in (tmp_path / "d.svg").read_text()
    text = fedexlora("deviation", one).stdout
    assert "60.00%" in text
    mixed = fedexlora("deviation", one, tmp_path, "--weights", "1,2")
    assert mixed.returncode == 2
    assert "--weights: of adapters only" in mixed.stderr
