"""A holder's half of the certificate, measured on a live model at the version that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from math import hypot

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.probes import Norm, Probes
from fedexlora.data.task import Task
from fedexlora.exchange.records import HolderRecord
from fedexlora.exchange.seeds import derive_seed
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.export_check import TOLERANCE
from fedexlora.peft_bridge.forward import Kept, measure_kept, multiplied_image
from fedexlora.peft_bridge.model import AdaptedModel

Forward = Callable[[], None]
"""Runs the model on some real inputs."""
_ROWS_READ = 8
"""Of a client, over which is measured what comes out of the layers."""
_Module = tuple[float, float, float, float]
"""Error, bound, what is allowed of it and forward error, relative to the module's update."""


@dataclass(frozen=True, slots=True)
class HolderMeasure:
    """Measures a model that has come to a version as a client's."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    def __call__(self, model: AdaptedModel, state: GlobalState, rows: Dataset) -> HolderRecord:
        """The client's half of the certificate.

        Args:
            model: entered as the client's.
            state: the version.
            rows: tokenised rows of the client, of which it reads the first.
        """
        read = rows.select(range(min(len(rows), _ROWS_READ)))
        forwards = {how: partial(self._read, model, how, read) for how in model.arithmetics}
        return holder_record(model, state, forwards)

    def _read(self, model: AdaptedModel, arithmetic: Arithmetic, rows: Dataset) -> None:
        live = model.peft_model
        with arithmetic.active(next(live.parameters()).device):
            self.task.evaluate(live, rows, self.tokenizer, self.batch_size)


def holder_record(
    model: AdaptedModel,
    state: GlobalState,
    forwards: Mapping[Arithmetic, Forward],
) -> HolderRecord:
    """Measure a model that has come to a version; it is left as it was.

    Args:
        model: the model, with the version applied, and entered as its client.
        state: the version.
        forwards: by arithmetic in which the model is used: runs it so on some real inputs.
    """
    modules = [_measured(model, name, state) for name in model.modules]
    error, bound, allowed, _ = max(modules, key=lambda found: found[1] / found[2])
    kept = _furthest(model, state, forwards.values())
    return HolderRecord(
        error=error,
        bound=bound,
        allowed=allowed,
        forward=max(forward for *_, forward in modules),
        kept=kept.share if kept else None,
        kept_error=kept.standard_error if kept else None,
    )


def held_error(model: AdaptedModel, name: str, state: GlobalState) -> Norm:
    """The holder's half: the live module less adapter and total, scaled.

    Args:
        model: the model, with the version applied.
        name: the module.
        state: the version.
    """
    probes = probes_of(name, state)
    return held_against(model, name, state, probes, wanted_image(model, name, state, probes))


def held_against(
    model: AdaptedModel, name: str, state: GlobalState, probes: Probes, wanted: Tensor
) -> Norm:
    """The same, of what the module should add as :func:`wanted_image` says; that is not written."""
    if probes.exact or name not in model.untouched:
        return probes.norm(model.image(name, probes).sub_(wanted))
    # The rounding of a fold is what is allowed: of that an estimate's bound would be too wide.
    folded = model.fold_error(name, state.total[name])
    image, scaling = model.adapter_image(name, probes), model.spec.modules[name].scaling
    beside = probes.norm(probes.add(image, state.adapter[name], -scaling))
    return Norm(hypot(folded, beside.value), folded + beside.bound)


def probes_of(name: str, state: GlobalState) -> Probes:
    """What a module is measured by, at a version."""
    shape = state.adapter[name].shape
    return Probes.of(shape, derive_seed(0, state.version, f"holder/{name}"))


def wanted_image(model: AdaptedModel, name: str, state: GlobalState, probes: Probes) -> Tensor:
    """The image of what a module should add to its untouched weight."""
    scaling, pair = model.spec.modules[name].scaling, state.adapter[name]
    image = probes.add(probes.zeros(pair.shape), pair, scaling)
    return probes.add(image, state.total[name].value, scaling)


def _measured(model: AdaptedModel, name: str, state: GlobalState) -> _Module:
    probes, start = probes_of(name, state), model.start.get(name)
    wanted = wanted_image(model, name, state, probes)
    held = held_against(model, name, state, probes, wanted)
    norm = update = probes.norm(wanted).value
    if start is not None:
        scaling = model.spec.modules[name].scaling
        update = probes.norm(probes.add(wanted, start, -scaling)).value
    narrowed = max(
        probes.norm(multiplied_image(model, name, arithmetic, probes).sub_(wanted)).value
        for arithmetic in model.arithmetics
    )
    # Of no update at all, nothing is lost by rounding.
    allowed = TOLERANCE + (ratio(model.fold_rounding(name), norm) if norm else 0.0)
    return ratio(held.value, norm), ratio(held.bound, norm), allowed, ratio(narrowed, update)


def _furthest(model: AdaptedModel, state: GlobalState, forwards: Iterable[Forward]) -> Kept | None:
    """What comes out of all remainders, in the arithmetic that is furthest from all of it."""
    found = [measure_kept(model, state.total, forward) for forward in forwards]
    pooled = [reduce(Kept.plus, kept.values()) for kept in found if kept]
    return max(pooled, key=lambda kept: abs(kept.share - 1.0), default=None)
