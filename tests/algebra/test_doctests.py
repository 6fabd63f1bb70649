"""The examples in the docstrings of `algebra` are true, and every module has some."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from fedexlora import algebra

MODULES = [module.name for module in pkgutil.iter_modules(algebra.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_are_true(name):
    found = doctest.testmod(importlib.import_module(f"fedexlora.algebra.{name}"))
    assert found.failed == 0
    assert found.attempted > 0
