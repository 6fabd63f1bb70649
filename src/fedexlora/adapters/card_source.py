"""Where a run's base model and data come from, as somebody on another machine would name it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Literal

from fedexlora.adapters.markdown import code_span, literal, one_line
from fedexlora.rounds.recipe import Recipe

_HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?"


@dataclass(frozen=True, slots=True)
class Source:
    """A model's or data set's place, without folders of this machine."""

    kind: Literal["hub", "package", "folder"]
    name: str
    """The hub's name, ``PACKAGE/PATH``, or the last part of a folder's path."""
    revision: str | None = None
    """Of the hub."""

    @staticmethod
    def of(source: str, revision: str | None = None) -> Source:
        """The place that a recipe's ``model.source`` or ``data.source`` names."""
        if source.startswith("package:"):
            return Source("package", source.removeprefix("package:"))
        path = Path(source)
        local = source.startswith((".", "/", "~")) or path.is_absolute() or path.is_dir()
        if local or not re.fullmatch(_HUB_NAME, source):
            named = path if path.name not in ("", "..") else path.absolute().resolve()
            return Source("folder", named.name or "root")
        return Source("hub", source, revision)

    def describe(self) -> str:
        """For a sentence, in Markdown."""
        if self.kind == "hub":
            at = f" at revision {code_span(self.revision)}" if self.revision else ""
            return f"{code_span(self.name)} of the hub{at}"
        if self.kind == "folder":
            return f"{code_span(self.name)}, a folder of the machine that ran it"
        package, _, inside = self.name.partition("/")
        where = f"the Python package {code_span(package)}{_pip(package)}"
        return f"the folder {code_span(inside)} of {where}"

    def code(self, name: str) -> list[str]:
        """Lines of Python that set ``name`` to what ``from_pretrained`` takes."""
        if self.kind == "hub":
            return [f"{name} = {literal(self.name)}"]
        if self.kind == "folder":
            note = "  # a local folder of the run: put the path of your copy here"
            return [f"{name} = {literal(self.name)}{note}"]
        package, _, inside = self.name.partition("/")
        return [f"{name} = str(files({literal(package)}).joinpath({literal(inside)}))"]

    def keywords(self) -> list[str]:
        """Keyword arguments of ``from_pretrained``."""
        return [f"revision={literal(self.revision)}"] if self.revision else []


def data_name(recipe: Recipe) -> str:
    """What a recipe's data is called, in Markdown."""
    data = recipe.data
    source = Source.of(data.source, data.revision)
    named = source.describe()
    if source.kind == "hub" and data.config:
        named += f", configuration {code_span(data.config)}"
    return named


def _pip(package: str) -> str:
    """How to get an installed package, if that is known."""
    found = packages_distributions().get(package)
    return f" (`pip install {one_line(found[0])}`)" if found else ""
