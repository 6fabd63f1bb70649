"""The layers of the adapters' base, where its configuration is on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from fedexlora.errors import AdapterError, of_training
from fedexlora.peft_bridge.adapter_file import AdapterFile
from fedexlora.peft_bridge.names import bias_owner

if TYPE_CHECKING:
    from fedexlora.peft_bridge.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base whose layers are known."""

    name: str
    skeleton: Skeleton

    def named(self, adapter: AdapterFile, faults: list[str]) -> AdapterFile:
        """An adapter with the names that this version of transformers has for its layers.

        Args:
            adapter: as it is stored.
            faults: gets a line if the base lacks some of its layers.
        """
        modules = self._loaded(adapter.modules)
        if lost := [name for name in adapter.modules if name not in modules]:
            faults.append(
                f"{adapter.folder}: {len(lost)} layers, {lost[0]} the first, are none of "
                f"{self.skeleton.class_name}'s in {self.name}, so PEFT would ignore them"
            )
        changed = {old: new for old, new in modules.items() if old != new}
        dense = {name: self._dense(name, modules) for name in adapter.dense}
        return adapter.renamed(changed, dense) if changed else adapter

    def _loaded(self, names: Iterable[str]) -> dict[str, str]:
        """Layers by the names that transformers loads them as; those in another form stay."""
        weights = {f"{name}.weight": name for name in names}
        return {
            weights[weight]: (parameter or weight).removesuffix(".weight")
            for weight, parameter in self.skeleton.loaded_as(weights).items()
        }

    def _dense(self, name: str, modules: dict[str, str]) -> str:
        owner = bias_owner(name) or (name.partition(".base_layer.")[0])
        if owner in modules:
            return modules[owner] + name.removeprefix(owner)
        return self.skeleton.loaded_as([name]).get(name) or name


def known_base(name: str, adapter: AdapterFile) -> KnownBase | None:
    """The base's layers, or None if its configuration is not here or is of no known model.

    None too where transformers is not installed, which knows the layers.

    Args:
        name: a folder, or a hub name that was downloaded before; nothing is downloaded.
        adapter: decides on the class.
    """
    folder = _folder(name)
    if folder is None:
        return None
    try:
        from fedexlora.peft_bridge.base_files import BaseFiles
        from fedexlora.peft_bridge.skeleton import build_skeleton
    except ModuleNotFoundError as error:
        if not of_training(error):
            raise
        return None
    try:
        return KnownBase(name, build_skeleton(BaseFiles(folder, (), indexed=False), adapter))
    except AdapterError:
        return None


def _folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    if name and (folder / "config.json").is_file():
        return folder
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
