"""The one device that a model is on, from its name."""

from __future__ import annotations

import torch

from fedexlora.errors import RecipeError

_WAY_OUT = {"cuda": "cuda:0", "mps": "mps"}


def find_device(name: str) -> torch.device:
    """The device of this machine that a recipe names.

    ``auto`` is the one accelerator that is visible, or the processor where there is none; ``cuda``
    is the one GPU that is visible. Of several, one has to be named: which one a run gets is not
    left to chance, and it never gets them all.

    Raises:
        RecipeError: if this machine has not got it, or several that it could be.
    """
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    if accelerator is None or count == 0:
        if kind == "auto":
            return torch.device("cpu")
        raise _refused(f"{name} is asked for, and there is the processor alone")
    if kind not in ("auto", accelerator.type) or (index and int(index) >= count):
        there = ", ".join(f"{accelerator.type}:{i}" for i in range(count))
        raise _refused(f"{name} is asked for, and there is {there}", accelerator.type)
    if not index and count > 1:
        raise _refused(
            f"{name} could be any of {count} devices, and a client trains on one of them",
            accelerator.type,
        )
    return torch.device(accelerator.type, int(index or 0))


def _refused(fault: str, kind: str = "cpu") -> RecipeError:
    way = f"name one that is there: --set training.device={_WAY_OUT.get(kind, 'cpu')}"
    return RecipeError(
        "this machine has not the one device that the recipe states",
        [f"training.device: {fault}", way],
    )
