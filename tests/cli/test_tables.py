"""What is printed is whole at any width, and shows what others wrote instead of obeying it."""

from __future__ import annotations

import io
import re
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedexlora.cli.main import main
from fedexlora.cli.tables import print_blocks, print_entry
from fedexlora.cli.text import make_console, plain
from fedexlora.texts import printable
from tests.cli.invoke import fedexlora
from tests.rounds.conftest import data_folder, whole  # noqa: F401 - fixtures

WIDTHS = (40, 60, 80, 120)


def console(columns: int) -> Console:
    return Console(file=io.StringIO(), width=columns, highlight=False)


def lines(shown: Console) -> list[str]:
    return shown.file.getvalue().splitlines()


@settings(deadline=None, max_examples=40)
@given(
    columns=st.integers(40, 130),
    header=st.lists(
        st.text("abcdefgh", min_size=1, max_size=16), min_size=2, max_size=12, unique=True
    ),
)
def test_every_column_of_a_table_of_numbers_is_whole_at_every_width(columns, header):
    rows = [[f"{10 * number + row}.0001" for number in range(len(header))] for row in range(3)]
    shown = console(columns)
    print_blocks(shown, "title", header, rows)
    words = [line.split() for line in lines(shown)]
    for number, name in enumerate(header):
        blocks = [i for i, line in enumerate(words) if name in line]
        assert blocks, name
        for row in rows:
            assert any(row[0] in line and row[number] in line for line in words), (name, row)
    assert all(len(line) <= columns for line in lines(shown))


@pytest.mark.parametrize("columns", WIDTHS)
def test_an_entry_goes_on_below_its_text(columns):
    shown = console(columns)
    print_entry(shown, "averaging", "would have lost up to [bold]12.5%[/] " + "of an update " * 9)
    first, *rest = lines(shown)
    assert first.startswith("averaging    would have")
    assert all(line.startswith(" " * 13) for line in rest)
    assert "".join(lines(shown)).count("update") == 9


@settings(deadline=None)
@example("site :warning: [red] \\[b] \\")
@given(st.text())
def test_outside_text_is_shown_and_never_obeyed(text):
    shown = make_console()
    shown.file = io.StringIO()
    shown.print(f"[bold]{plain(text)}[/] and more", soft_wrap=True)
    assert shown.file.getvalue() == f"{printable(text)} and more\n"
    assert all(c.isprintable() or c == "\n" for c in printable(text))


@pytest.fixture(scope="module")
def updates(whole):  # noqa: F811
    return sorted((whole / "updates" / "round-0001").iterdir())


@pytest.mark.parametrize("columns", WIDTHS)
def test_no_command_cuts_what_it_prints(columns, whole, updates, tmp_path):  # noqa: F811
    shown = [
        fedexlora("methods", columns=columns),
        fedexlora("deviation", *updates, columns=columns),
        fedexlora("aggregate", *updates, "--out", tmp_path / "mean", columns=columns),
        fedexlora("export", whole, "--out", tmp_path / "out", columns=columns),
    ]
    for done in shown:
        assert done.returncode == 0, done.stderr
        assert "…" not in done.stdout
    letters = re.sub(r"\s", "", shown[1].stdout)
    for name in ("bert.encoder.layer.0.attention.self.query", "attention.self.value"):
        # A name that is folded has the other columns between its parts.
        assert name in letters or columns < 80
    for word in ("averaging", "loses", "norm of the", "mean update"):
        assert word in shown[1].stdout or columns == 40
    for paper in ("arXiv:2410.09432", "arXiv:2305.05644", "arXiv:2403.12313"):
        assert paper in shown[0].stdout or columns == 40


def test_a_terminal_that_writes_ascii_only_gets_everything_but_the_bars(updates, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    named = updates[0].parent.parent / "größe"
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.argv", ["fedexlora", "deviation", *map(str, updates)])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        main()
    stream.flush()
    shown = stream.buffer.getvalue().decode("ascii")
    assert end.value.code == 0
    assert "attention.self.query" in shown
    assert "\\u" not in shown
    monkeypatch.setattr("sys.argv", ["fedexlora", "recipes", "--write", str(named)])
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as end:
        main()
    sys.stderr.flush()
    assert end.value.code == 2
    assert b"gr\\xf6" in sys.stderr.buffer.getvalue()
