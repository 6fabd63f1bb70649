"""Where a base model lies, by what a recipe names."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

from fedexlora.errors import BridgeError


def resolve_source(source: str) -> str:
    """The folder or hub name of the base model that a recipe's ``model.source`` means.

    Raises:
        BridgeError: as :func:`locate`, or if it is an adapter.
    """
    found = locate(source)
    refuse_adapter(source, Path(found))
    return found


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


def refuse_adapter(source: str, folder: Path) -> None:
    """Refuse an adapter as a base: transformers loads it with its own base, and PEFT loses it.

    Raises:
        BridgeError: if it is one; says the command that makes a base of it.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        named = None
    base, merged = shlex.quote(str(named or "BASE")), f"{folder.resolve().name}-merged"
    out = shlex.quote(f"./{merged}")
    command = (
        f"fedexlora aggregate {shlex.quote(str(folder))} --as merged --base {base} --out {out}"
    )
    raise BridgeError(
        f"model.source {source!r} is an adapter ({path.name}), not a base model",
        [
            f"merge it first: {command}",
            f"then set model.source = {json.dumps('./' + merged)}",
        ],
    )
