"""Where a base model lies, by what a recipe names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fedexlora.errors import BridgeError


def locate(source: str) -> str:
    """The folder or hub name that a source means, whatever is there.

    ``package:NAME/PATH`` is the folder PATH inside the installed Python package NAME; everything
    else is taken as it is: a folder or a hub name.

    Raises:
        BridgeError: if the package is not installed, or a path does not exist.
    """
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise BridgeError(f"model.source {source!r}: no package {package!r} is installed")
        folder = Path(found.submodule_search_locations[0]) / inside
    elif source.startswith((".", "/", "~")):
        folder = Path(source).expanduser()
    else:
        return source
    if not folder.is_dir():
        raise BridgeError(f"model.source {source!r}: there is no folder {folder}")
    return str(folder)
