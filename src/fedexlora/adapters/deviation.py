"""How far the mean of adapters' factors is from the mean of their updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fedexlora.adapters.sources import Progress, Sources, open_sources
from fedexlora.algebra.deviation import Deviation, ratio
from fedexlora.algebra.deviation import deviation as module_deviation
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.moments import Moments
from fedexlora.errors import AdapterError
from fedexlora.exchange.adapter_records import DeviationModuleRecord, DeviationRecord
from fedexlora.exchange.module_names import split_name


def deviation(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
    task: str | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> DeviationRecord:
    """What averaging the factors loses: the deviation of arXiv:2410.09432, Sec. 5.

    By module ``|M - B A| / |M|``, with ``M = sum_i p_i s_i B_i A_i`` and the means ``A`` of
    ``A_i`` and ``B`` of ``s_i B_i``, those of lower rank padded with zeros.

    Args:
        adapters: folders of PEFT LoRA adapters of one base model.
        weights: one for each adapter, positive; equal by default.
        base: the base model, if the adapters call it by different names.
        task: PEFT's name of the task, if the adapters name different ones.
        allow_missing: take a layer that an adapter lacks for a zero update.
        progress: told of modules done and in all.

    Raises:
        AdapterError: if the adapters cannot be compared.

    >>> found = deviation(["site-1", "site-2", "site-3"], weights=[1, 2, 5])
    >>> 0 < found.deviation < 2
    True
    >>> found.modules[0].projection
    'attention.output.dense'
    """
    sources = open_sources(adapters, weights, base=base, task=task, allow_missing=allow_missing)
    records, faults = [], []
    for done, name in enumerate(sources.modules, 1):
        try:
            found = _module(sources, name)
        except AdapterError as error:
            faults.append(str(error))
            continue
        layer, projection = split_name(name)
        records.append(
            DeviationModuleRecord(
                module=name,
                layer=layer,
                projection=projection,
                residual=found.residual,
                ideal=found.ideal,
                deviation=found.relative,
            )
        )
        if progress:
            progress(done, len(sources.modules))
    if faults:
        raise AdapterError("these adapters cannot be compared", faults)
    residual, ideal = (
        sum(getattr(m, part) ** 2 for m in records) ** 0.5 for part in ("residual", "ideal")
    )
    return DeviationRecord(
        sources=sources.records(),
        base=sources.base,
        deviation=ratio(residual, ideal),
        modules=tuple(records),
    )


def _module(sources: Sources, name: str) -> Deviation:
    return module_deviation(Moments.over(_factors(sources, name), torch.float64))


def _factors(sources: Sources, name: str) -> Iterator[tuple[Factors, float]]:
    """A layer's factors in every adapter, float64, at one rank; zeros where an adapter lacks it."""
    rank = max(adapter.modules[name].rank for adapter, _ in sources.having(name))
    zero = Factors.empty(*sources.modules[name].shape, torch.float64).padded(rank)
    for adapter, share in zip(sources.adapters, sources.shares, strict=True):
        module = adapter.modules.get(name)
        if module is None:
            yield zero, share
        else:
            raw = adapter.factors(name).to(torch.float64)
            yield raw.scaled(module.scaling).padded(rank), share
