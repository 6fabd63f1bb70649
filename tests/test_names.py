"""The names that people use stand at the top of the package; everything else is an inner path."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedexlora
from tests.test_docs import PAGES

ROOT = Path(__file__).parents[1]
PUBLIC = {"fedexlora", "fedexlora.flower"}
"""Modules that users may import from. ``fedexlora.flower`` is one of its own, as it needs flwr: the
drop-in strategy, and the apps of a deployment."""
SHOWN = [*PAGES, *sorted((ROOT / "examples").rglob("*.py")), *sorted((ROOT / "recipes").glob("*"))]


def declared() -> dict[str, str]:
    """What a type checker is told: the module of every name."""
    tree = ast.parse(Path(fedexlora.__file__).read_text(encoding="utf-8"))
    (block,) = (
        x for x in tree.body if isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING"
    )
    return {
        alias.name: str(part.module)
        for part in block.body
        if isinstance(part, ast.ImportFrom)
        for alias in part.names
    }


def test_the_names_the_types_and_the_homes_are_the_same():
    homes = {name: f"fedexlora.{module}" for name, module in fedexlora._MODULES.items()}
    assert declared() == homes
    assert set(fedexlora.__all__) == {*homes, "__version__"}
    assert fedexlora.__all__ == sorted(fedexlora.__all__)


@pytest.mark.parametrize("name", [x for x in fedexlora.__all__ if x != "__version__"])
def test_a_name_is_the_thing_of_its_module_and_in_the_docstring(name):
    found = getattr(fedexlora, name)
    assert found is getattr(importlib.import_module(declared()[name]), name)
    assert callable(found)
    assert re.search(rf"\b{name}\b", fedexlora.__doc__)


def test_no_name_is_that_of_a_module():
    """Importing a module sets it on the package, in the place of what has its name."""
    modules = {found.name for found in pkgutil.iter_modules(fedexlora.__path__)}
    assert not modules & set(fedexlora.__all__)


def test_deviation_is_the_function_whatever_was_imported_before():
    for module in ("fedexlora.algebra.deviation", "fedexlora.adapters.deviation"):
        importlib.import_module(module)
    from fedexlora import deviation

    assert callable(deviation)


def test_they_are_listed_and_listing_them_loads_nothing():
    code = (
        "import sys, fedexlora; listed = dir(fedexlora);"
        "assert set(fedexlora.__all__) <= set(listed), listed;"
        "assert not {'torch', 'pydantic', 'fedexlora.errors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'aggregate'"):
        fedexlora.aggregate  # noqa: B018 - it is not there


def test_what_people_are_shown_uses_no_inner_path():
    assert len(SHOWN) > 20
    lines = re.compile(r"^\s*(?:from|import) +(fedexlora[\w.]*)", re.M)
    inner = [
        (file.name, module)
        for file in SHOWN
        if file.is_file()
        for module in lines.findall(file.read_text("utf-8"))
        if module not in PUBLIC
    ]
    assert inner == []


def test_the_names_that_the_pages_use_are_there():
    used = {
        name
        for page in PAGES
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
        for name in re.findall(r"\bfedexlora\.(\w+)", block)
    }
    assert {"run", "load_recipe"} <= used
    assert used <= {*fedexlora.__all__, "flower"}
