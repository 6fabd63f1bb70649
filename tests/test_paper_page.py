"""The page on the paper: no cell is empty, every command is valid, and the numbers add up."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from benchmarks.communication import Shapes, models, our_numbers, paper_table

from fedexlora.methods import METHODS
from fedexlora.rounds.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
STANDS_FOR = {
    "TASK": ("cola", "rte", "mrpc", "sst2", "qnli", "stsb"),
    "MODEL": ("mistral-7b", "gemma-2-9b"),
}
ROUNDS, CLIENTS, RANK = 5, 3, 4
TABLE_8 = ("fedex", "fedit", "ffa")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def tables(page: str) -> list[list[list[str]]]:
    blocks = re.findall(r"^\|.*?(?=^[^|]|\Z)", page, re.M | re.S)
    return [[cells(line) for line in block.strip().splitlines()] for block in blocks]


def part(heading: str) -> str:
    """From a heading to the next one."""
    found = re.search(rf"^## {heading}.*?(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, heading
    return found[0]


def commands() -> Iterator[tuple[str, str]]:
    """Each command, alone and with everything that is added to it, by recipe."""
    command = "fedexlora run recipes/cola.toml --out runs/any"
    for found in re.finditer(r"^ {4}(fedexlora run .+)$|`(--set [^`]+)`", PAGE, re.M):
        command = found[1] or command
        word = next((word for word in STANDS_FOR if word in command), "")
        for name in STANDS_FOR.get(word, ("",)):
            yield command.replace(word, name) if word else command, found[2] or ""


COMMANDS = sorted(set(commands()))


def test_all_tables_of_the_paper_are_there():
    headings = "\n".join(re.findall(r"^## (.*)$", PAGE, re.M))
    assert set(range(1, 12)) <= {int(x) for x in re.findall(r"\b(\d+)\b(?=.*:)", headings)}
    assert len(tables(PAGE)) >= 20


def test_no_cell_is_empty_and_all_rows_are_of_one_length():
    for head, line, *rows in tables(PAGE):
        assert all(re.fullmatch(":?-+:?", cell) for cell in line), head
        assert rows, head
        for row in (head, line, *rows):
            assert len(row) == len(head), row
            assert all(row), row


def test_every_recipe_that_is_named_exists():
    named = set(re.findall(r"recipes/([\w/-]+\.toml)", PAGE))
    for word, names in STANDS_FOR.items():
        named |= {path.replace(word, name) for path in named if word in path for name in names}
    named = {path for path in named if not any(word in path for word in STANDS_FOR)}
    assert len(named) >= 10
    assert {path for path in named if not (ROOT / "recipes" / path).exists()} == set()


def test_the_commands_are_found():
    assert len({command for command, _ in COMMANDS}) >= 60
    assert len(COMMANDS) >= 200


@pytest.mark.parametrize("command", sorted({command for command, _ in COMMANDS}))
def test_every_command_and_every_row_is_a_valid_recipe(command):
    for added in (added for found, added in COMMANDS if found == command):
        words = shlex.split(f"{command} {added}")
        assert words[:2] == ["fedexlora", "run"]
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        load_recipe(ROOT / words[2], overrides)
        assert {w for w in words if w.startswith("--")} <= {"--out", "--set", "--keep-updates"}


def test_what_a_row_of_the_same_model_and_method_adds_differs():
    for head, _, *rows in tables(PAGE):
        if "added to the command" in head:
            at = [head.index(name) for name in head if name in ("added to the command", "model")]
            assert len({tuple(row[i] for i in at) for row in rows}) == len(rows), head


def test_means_are_those_of_their_rows():
    """To two units of the last digit: some of the paper's are cut, not rounded."""
    seen = 0
    for head, _, *rows in tables(PAGE):
        if "mean" not in head:
            continue
        end = head.index("mean")
        for row in rows:
            *scores, mean = map(float, row[2 : end + 1])
            assert abs(sum(scores) / len(scores) - mean) < 0.0151, row
            seen += 1
    assert seen == 4 + 16 + 3 + 12


def test_gains_are_those_of_their_rows():
    ((head, _, *rows),) = tables(part("Table 9"))
    for row in rows:
        said = {name: row[head.index(name)] for name in ("FedEx-LoRA", "FedIT", "gain over FedIT")}
        ours, theirs, gain = map(float, said.values())
        assert abs(ours - theirs - gain) < 1e-6, row


SQUARE = {"base": [(768, 768)] * 24, "large": [(1024, 1024)] * 48}
SIZES = {
    "RoBERTa-base": (124_647_170, SQUARE["base"], 768 * 768 + 768 + 2 * 768 + 2),
    "RoBERTa-large": (355_361_794, SQUARE["large"], 1024 * 1024 + 1024 + 2 * 1024 + 2),
    "GPT-2": (124_439_808, [(2304, 768), (768, 768), (768, 3072)] * 12, 0),
}
"""Parameters, (d_out, d_in) of the adapted layers, numbers in the head."""


def sent_and_received(
    modules: list[tuple[int, int]], head: int, method: str
) -> tuple[list[int], list[int]]:
    """What one client sends and receives in each round, by the protocol's description."""
    b = sum(RANK * m for m, _ in modules)
    both = b + sum(RANK * n for _, n in modules)
    trained = b if method == "ffa" else both
    residual = (CLIENTS - 1) * both if method == "fedex" else 0
    later = trained + residual + head
    return [trained + head] * ROUNDS, [both + head] + [later] * (ROUNDS - 1)


def test_the_shapes_are_those_of_the_models():
    for name, found in models().items():
        weights, modules, head = SIZES[name]
        assert (found.weights, found.head_size) == (weights, head)
        assert sorted(found.modules.values()) == sorted(modules)


@pytest.mark.parametrize("method", TABLE_8)
def test_messages_have_the_numbers_that_shapes_give(method):
    modules = [(40, 56), (64, 48), (48, 48)]
    small = Shapes(0, dict(zip("abc", modules, strict=True)), {"head.weight": (2, 5)})
    assert our_numbers(small, METHODS[method]) == sent_and_received(modules, 10, method)


def test_our_table_8_is_recomputed_from_shapes():
    _, (_, _, *rows) = tables(part("Table 8"))
    by_title = {METHODS[name].title: name for name in TABLE_8}
    assert [tuple(row[:2]) for row in rows] == list(product(SIZES, by_title))
    for row in rows:
        _, modules, head = SIZES[row[0]]
        sent, received = map(sum, sent_and_received(modules, head, by_title[row[1]]))
        whole = sum(map(sum, sent_and_received(modules, head, "fedex")))
        heads = 2 * ROUNDS * head
        shares = ((sent + received) / whole, (sent + received - heads) / (whole - heads))
        assert row[2:] == [f"{sent:,}", f"{received:,}", *(f"{share:.3f}" for share in shares)]


def test_the_papers_table_8_is_recomputed():
    found, _ = tables(part("Table 8"))
    assert found == [cells(line) for line in paper_table(models())]
