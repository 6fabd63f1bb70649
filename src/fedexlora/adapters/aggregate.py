"""The exact weighted mean of stored adapters, as one stored adapter.

For every layer ``sum_i p_i s_i B_i A_i`` (arXiv:2410.09432, eq. 6, for any weights, ranks and
scalings) is a product of the stacked factors, compacted to its numerical rank or truncated to the
best approximation of a rank or error (Eckart-Young). Layers are read, summed and written one at a
time: memory does not grow with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedexlora.adapters.output import output
from fedexlora.adapters.output_check import check_held, check_written
from fedexlora.adapters.padding import pad_to_one_rank
from fedexlora.adapters.sources import Progress, Sources, open_sources
from fedexlora.adapters.tokenizers import copy_tokenizer, tokenizer_faults
from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.product_sum import Cut, ProductSum, Term
from fedexlora.errors import AdapterError
from fedexlora.exchange.adapter_records import AdaptedModuleRecord, AggregationRecord
from fedexlora.exchange.spec import TensorSpec
from fedexlora.exchange.tensors import pieces
from fedexlora.methods import METHODS, Method
from fedexlora.peft_bridge.adapter_config import TENSORS
from fedexlora.peft_bridge.adapter_file import AdapterFile
from fedexlora.peft_bridge.adapter_writer import AdapterWriter
from fedexlora.peft_bridge.names import bias_owner

RECORD = "aggregation.json"


def aggregate_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "fedex",
    rank: int | None = None,
    tolerance: float | None = None,
    uniform_rank: bool = False,
    base: str | None = None,
    task: str | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> AggregationRecord:
    """Write the weighted mean of PEFT LoRA adapters as one PEFT LoRA adapter.

    Heads and biases are averaged. Every module of the result has the lowest rank that loses
    nothing, unless a rank or a tolerance is given.

    Args:
        adapters: folders of adapters of one base model; their ranks and scalings may differ.
        out: the new adapter's folder; it must not exist, or be empty.
        weights: one for each adapter, positive; only their ratios matter. Equal by default.
        method: ``fedex``, the exact mean; ``fedit`` or ``ffa``, the mean of the factors.
        rank: the largest rank of a module.
        tolerance: the largest ``|result - ideal| / |ideal|`` of a module, below 1.
        uniform_rank: pad every module with zeros to the largest rank, for servers that multiply
            by ``lora_alpha`` over the rank of the module's own tensor, as llama.cpp does.
        base: the base model, if the adapters call it by different names. If it is a folder, or
            was downloaded before, PEFT's own loading of the result is tried on its layers.
        task: PEFT's name of the task, if the adapters name different ones.
        allow_missing: take a layer that an adapter lacks for a zero update.
        progress: told of modules done and in all.

    Returns:
        What was written, with the error of every module; also stored as ``aggregation.json``.

    Raises:
        AdapterError: if the adapters or arguments cannot be used; ``out`` is untouched then.
        ExactnessError: if a module that was written is not the mean, but for what is stated.

    >>> done = aggregate_adapters(["site-1", "site-2", "site-3"], "mean", weights=[1, 2, 5])
    >>> done.lossless, done.rank
    (True, 12)
    >>> small = aggregate_adapters(["site-1", "site-2", "site-3"], "small", rank=4)
    >>> small.rank, 0.1 < small.error < 0.9
    (4, True)
    """
    _check_arguments(method, rank, tolerance)
    sources = open_sources(adapters, weights, base=base, task=task, allow_missing=allow_missing)
    rule = METHODS[method]
    if "A" not in rule.default.factors:
        _check_shared(sources, rule)
    if faults := tokenizer_faults(sources.adapters):
        raise AdapterError("the tokenizers beside these adapters differ", faults)
    with output(Path(out)) as folder:
        dense = _dense_specs(sources)
        with AdapterWriter(folder, _template(sources), sources.modules, dense) as writer:
            modules = _modules(sources, rule, rank, tolerance, writer, progress)
            for name, spec in dense.items():
                writer.add_dense(name, spec, _dense_mean(sources, name, spec))
        if uniform_rank:
            pad_to_one_rank(folder, writer.rank)
            modules = [m.model_copy(update={"rank": writer.rank}) for m in modules]
        matched = check_written(folder, sources)
        check_held(folder, sources, modules)
        tokenizer = copy_tokenizer(sources.adapters, folder)
        record = _record(sources, rule, modules, writer.rank, folder / TENSORS)
        record = record.model_copy(update={"matched_with": matched, "tokenizer": tokenizer})
        (folder / RECORD).write_text(record.model_dump_json(indent=2), encoding="utf-8")
    return record


def compress_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    uniform_rank: bool = False,
    progress: Progress | None = None,
) -> AggregationRecord:
    """Write one adapter at a lower rank, optimally; without one, at the lowest that loses nothing.

    Args and errors are those of :func:`aggregate_adapters`.

    >>> compress_adapter("site-1", "tight", tolerance=0.05).error <= 0.05
    True
    """
    return aggregate_adapters(
        [adapter],
        out,
        rank=rank,
        tolerance=tolerance,
        uniform_rank=uniform_rank,
        progress=progress,
    )


def _check_arguments(method: str, rank: int | None, tolerance: float | None) -> None:
    faults = []
    if method not in METHODS:
        faults.append(f"--method: expected one of {', '.join(METHODS)}, found {method!r}")
    elif METHODS[method].stored == "none":
        faults.append(f"--method: {method} needs more than finished adapters")
    if rank is not None and rank < 1:
        faults.append(f"--rank: expected at least 1, found {rank}")
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        faults.append(f"--tolerance: expected at least 0 and below 1, found {tolerance}")
    if rank is not None and tolerance is not None:
        faults.append("--tolerance: give it or --rank, not both")
    if faults:
        raise AdapterError("these options cannot be used", faults)


def _check_shared(sources: Sources, method: Method) -> None:
    """Refuse adapters that were not trained with a frozen A, for a method that assumes it."""
    faults = []
    for name in sources.modules:
        having = [adapter.factors(name).A for adapter, _ in sources.having(name)]
        if not all(torch.equal(a, having[0]) for a in having[1:]):
            faults.append(f"{name}: its A differs between adapters")
    if faults:
        raise AdapterError(f"{method.name} is for adapters that share a frozen A", faults)


def _template(sources: Sources) -> dict[str, object]:
    """Settings that cover all modules: those of an adapter that has them all, if there is one."""
    said = {"base_model_name_or_path": sources.base, "task_type": sources.task}
    for adapter in sources.adapters:
        if len(adapter.modules) == len(sources.modules):
            return {**adapter.config, **said}
    whole = {"target_modules": sorted(sources.modules), "exclude_modules": None}
    return {
        **sources.adapters[0].config,
        **whole,
        **said,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _modules(
    sources: Sources,
    method: Method,
    rank: int | None,
    tolerance: float | None,
    writer: AdapterWriter,
    progress: Progress | None,
) -> list[AdaptedModuleRecord]:
    """Sum, cut and write every module; the first value of each that is not finite is named."""
    records, faults = [], []
    for done, name in enumerate(sources.modules, 1):
        try:
            cut, ideal, lost = _module(sources, name, method, rank, tolerance)
        except AdapterError as error:
            faults.append(str(error))
            continue
        writer.add(name, cut.rank, cut.rows)
        records.append(AdaptedModuleRecord(module=name, rank=cut.rank, ideal=ideal, error=lost))
        if progress:
            progress(done, len(sources.modules))
    if faults:
        raise AdapterError("these adapters cannot be aggregated", faults)
    return records


def _module(
    sources: Sources, name: str, method: Method, rank: int | None, tolerance: float | None
) -> tuple[Cut, float, float]:
    """One module's result, the norm of its ideal update, and the relative error of the result."""
    shape = sources.modules[name].shape
    terms = [
        Term(module.rank, share * module.scaling, partial(adapter.factor, name))
        for adapter, share in sources.having(name)
        for module in (adapter.modules[name],)
    ]
    ideal = ProductSum(*shape, terms)
    if method.stored == "products":
        cut = _cut(ideal, rank, tolerance)
        # What is left out at the numerical rank is rounding, and no error.
        return cut, ideal.norm, cut.maps.share if rank is not None or tolerance else 0.0
    if method.stored != "factors":
        raise AssertionError(f"{method.name}: no arithmetic is known for {method.stored!r}")
    cut = _cut(ProductSum(*shape, [Term.of(_mean_factors(sources, name), 1.0)]), rank, tolerance)
    lost = ProductSum(*shape, [*terms, Term.of(cut.factors(), -1.0)])
    return cut, ideal.norm, ratio(lost.norm, ideal.norm)


def _cut(total: ProductSum, rank: int | None, tolerance: float | None) -> Cut:
    if rank is not None:
        return total.at_rank(rank)
    return total.within(tolerance) if tolerance else total.within()


def _mean_factors(sources: Sources, name: str) -> Factors:
    """The mean of A and of scaling * B, those of lower rank padded with zeros; float64."""
    rank = max(adapter.modules[name].rank for adapter, _ in sources.having(name))
    mean = Factors.empty(*sources.modules[name].shape, torch.float64).padded(rank)
    for adapter, share in sources.having(name):
        factors = adapter.factors(name).to(torch.float64).padded(rank)
        mean.A.add_(factors.A, alpha=share)
        mean.B.add_(factors.B, alpha=share * adapter.modules[name].scaling)
    return mean


def _dense_specs(sources: Sources) -> dict[str, TensorSpec]:
    """Shapes and dtypes of the averaged heads and biases.

    float32, but for what is the same in all adapters, such as a stored copy of the embedding.
    Wide dtypes first: some readers want tensors at multiples of their width.
    """
    found = {
        name: spec if _same(sources, name) else TensorSpec(spec.shape, torch.float32)
        for name, spec in sources.dense.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))


def _same(sources: Sources, name: str) -> bool:
    spec = sources.dense[name]
    first, *others = sources.adapters
    if bias_owner(name) or any(x.dense.get(name) != spec for x in sources.adapters):
        return False
    return all(
        torch.equal(first.dense_rows(name, *part), other.dense_rows(name, *part))
        for part in pieces(spec)
        for other in others
    )


def _dense_mean(sources: Sources, name: str, spec: TensorSpec) -> Iterator[Tensor]:
    """The mean in groups of rows; a bias of factors times its scaling, which is 1 in the result."""
    for start, stop in pieces(spec):
        total: Tensor | None = None
        for adapter, share in zip(sources.adapters, sources.shares, strict=True):
            if name not in adapter.dense:
                continue
            part = adapter.dense_rows(name, start, stop).double() * (share * _scale(adapter, name))
            total = part if total is None else total.add_(part)
        if total is not None:
            yield total.to(spec.dtype)


def _scale(adapter: AdapterFile, name: str) -> float:
    owner = bias_owner(name)
    return adapter.modules[owner].scaling if owner else 1.0


def _record(
    sources: Sources,
    method: Method,
    modules: Sequence[AdaptedModuleRecord],
    rank: int,
    tensors: Path,
) -> AggregationRecord:
    lost = sum((m.error * m.ideal) ** 2 for m in modules) ** 0.5
    whole = sum(m.ideal**2 for m in modules) ** 0.5
    return AggregationRecord(
        method=method.name,
        sources=sources.records(),
        base=sources.base,
        rank=rank,
        error=ratio(lost, whole),
        lossless=lost == 0.0,
        modules=tuple(modules),
        dense=tuple(sources.dense),
        bytes=tensors.stat().st_size,
    )
