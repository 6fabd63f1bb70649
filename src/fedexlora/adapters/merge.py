"""A stored adapter merged into its base: a full model, written shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedexlora.adapters.output import check_new, output
from fedexlora.adapters.sources import Progress
from fedexlora.adapters.tokenizers import FILES as TOKENIZER
from fedexlora.adapters.tokenizers import copy_tokenizer, has_tokenizer
from fedexlora.algebra.deviation import ratio
from fedexlora.errors import AdapterError
from fedexlora.exchange.adapter_records import MergedTensorRecord, MergeReport
from fedexlora.exchange.spec import TensorSpec
from fedexlora.exchange.tensors import TensorFile, TensorWriter, pieces
from fedexlora.peft_bridge.adapter_file import AdapterFile, open_adapter
from fedexlora.peft_bridge.base_files import INDEX, BaseFiles, open_base
from fedexlora.peft_bridge.changes import ChangedTensor
from fedexlora.peft_bridge.merge_plan import MergePlan, plan_merge
from fedexlora.peft_bridge.skeleton import build_skeleton

RECORD = "merge.json"


def merge_adapter(
    adapter: str | Path,
    base: str,
    out: str | Path,
    *,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``W + scaling * B @ A`` for every adapted layer, and all else as the base has it.

    Shards, names and dtypes are those of the base's files. Sums are made in float64 and rounded
    to the base's dtype once, and the report says what that rounding loses of the update. Memory
    stays far below the size of one shard.

    Args:
        adapter: a PEFT LoRA adapter's folder.
        base: the untouched base model: a folder, ``package:NAME/PATH`` or a hub name.
        out: the merged model's folder; it must not exist, or be empty.
        revision: of a base on the hub.
        config: changes to the base's configuration that the adapter was trained with, such as
            the names of labels.
        progress: told of tensors done and in all.

    Returns:
        What was changed and how exactly; also stored as ``merge.json``.

    Raises:
        AdapterError: if the two do not fit, cannot be merged, or ``out`` cannot be written;
            ``out`` is untouched then.

    >>> done = merge_adapter("mean", "base", "merged")
    >>> done.dtype, done.error < 1e-5
    ('float32', True)
    """
    check_new(Path(out))
    stored, files = open_adapter(Path(adapter)), open_base(base, revision)
    skeleton = build_skeleton(files, stored, config)
    plan = plan_merge(stored, files, skeleton)
    shapes = skeleton.shapes
    own_tokenizer = has_tokenizer(stored.folder)
    with output(Path(out)) as folder:
        merge = _Merge(stored, files, plan, shapes, [], progress)
        size = merge.write(folder)
        skeleton.save_config(folder)
        for path in files.others():
            if not (own_tokenizer and path.name in TOKENIZER):
                shutil.copyfile(path, folder / path.name)
        copy_tokenizer([stored], folder)
        report = _report(merge.sums, plan, size, adapter=adapter, base=base, revision=revision)
        (folder / RECORD).write_text(report.model_dump_json(indent=2), encoding="utf-8")
    return report


@dataclass(slots=True)
class _Sum:
    """A changed tensor, and squares summed over its numbers."""

    name: str
    dtype: torch.dtype
    ideal: float = 0.0
    lost: float = 0.0

    def add(self, ideal: Tensor, lost: Tensor) -> None:
        """Add the change of some rows, float64, and what rounding takes from it."""
        self.ideal += float(torch.linalg.vector_norm(ideal)) ** 2
        self.lost += float(torch.linalg.vector_norm(lost)) ** 2
        if not isfinite(self.lost):
            raise _not_finite(self.name, self.dtype)

    def record(self) -> MergedTensorRecord:
        module, _, parameter = self.name.rpartition(".")
        return MergedTensorRecord(
            module=module,
            parameter=parameter,
            ideal=sqrt(self.ideal),
            error=ratio(sqrt(self.lost), sqrt(self.ideal)),
            dtype=str(self.dtype).removeprefix("torch."),
        )


@dataclass(slots=True)
class _Merge:
    """The files of a merged model while they are written."""

    adapter: AdapterFile
    files: BaseFiles
    plan: MergePlan
    shapes: Mapping[str, tuple[int, ...]]
    """Of the merged model's parameters."""
    sums: list[_Sum]
    """Of the changed tensors so far."""
    progress: Progress | None

    def write(self, folder: Path) -> int:
        """Write all shards, and their index if there was one; returns the bytes of all tensors."""
        plan, total, done = self.plan, len(self.plan.names) + len(self.plan.added), 0
        weight_map: dict[str, str] = {}
        size = 0
        for shard in self.files.shards:
            added = plan.added if shard is self.files.shards[-1] else {}
            names = [*(plan.names[name] for name in shard.tensors), *added]
            weight_map |= dict.fromkeys(names, shard.path.name)
            with TensorWriter(folder / shard.path.name, names, shard.metadata) as writer:
                for name, spec, rows in self._tensors(shard, added):
                    writer.add_pieces(name, spec, rows)
                    size += prod(spec.shape) * spec.dtype.itemsize
                    done += 1
                    if self.progress:
                        self.progress(done, total)
        if self.files.indexed:
            index = {
                "metadata": {"total_size": size},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return size

    def _tensors(
        self, shard: TensorFile, added: Iterable[str]
    ) -> Iterator[tuple[str, TensorSpec, Iterator[Tensor]]]:
        """Name, shape and rows of every tensor of one new shard."""
        for name, spec in shard.tensors.items():
            changed = name in self.plan.changes
            if not changed:
                yield self.plan.names[name], spec, _copied(shard, name)
                continue
            new = TensorSpec(self.shapes[self.plan.changes[name][0]], spec.dtype)
            yield self.plan.names[name], new, self._changed(shard, name, new)
        for name in added:
            dense = self.plan.added[name]
            spec = TensorSpec(self.adapter.dense[dense].shape, self.files.dtype)
            yield name, spec, self._added(name, spec)

    def _changed(self, shard: TensorFile, name: str, spec: TensorSpec) -> Iterator[Tensor]:
        """One changed tensor's rows, rounded to its dtype, and what that loses."""
        parameter, change = self.plan.changes[name]
        target = ChangedTensor.of(self.adapter, change)
        found = _Sum(parameter, spec.dtype)
        for part in pieces(spec):
            old = _resized(shard, name, spec, part)
            wanted = target.rows(old, *part)
            rounded = wanted.to(spec.dtype)
            found.add(wanted - old.double(), rounded.double() - wanted)
            yield rounded
        self.sums.append(found)

    def _added(self, name: str, spec: TensorSpec) -> Iterator[Tensor]:
        for part in pieces(spec):
            rows = self.adapter.dense_rows(self.plan.added[name], *part).to(spec.dtype)
            if not bool(rows.isfinite().all()):
                raise _not_finite(name, spec.dtype)
            yield rows


def _copied(shard: TensorFile, name: str) -> Iterator[Tensor]:
    return (_rows(shard, name, part) for part in pieces(shard.tensors[name]))


def _rows(shard: TensorFile, name: str, part: tuple[int, int]) -> Tensor:
    """Some rows of a tensor; one without dimensions has no rows, and is read whole."""
    return shard.read_rows(name, *part) if shard.tensors[name].shape else shard.read(name)


def _resized(shard: TensorFile, name: str, spec: TensorSpec, part: tuple[int, int]) -> Tensor:
    """Some rows of the base, and zeros for those of tokens that it does not have."""
    if shard.tensors[name].shape == spec.shape:
        return _rows(shard, name, part)
    start, stop = (min(row, shard.tensors[name].shape[0]) for row in part)
    rows = shard.read_rows(name, start, stop)
    return torch.cat([rows, rows.new_zeros(part[1] - part[0] - len(rows), *spec.shape[1:])])


def _not_finite(name: str, dtype: torch.dtype) -> AdapterError:
    short = str(dtype).removeprefix("torch.")
    return AdapterError(f"{name}: the merged weight has values that are not finite in {short}")


def _report(
    sums: Sequence[_Sum],
    plan: MergePlan,
    size: int,
    *,
    adapter: str | Path,
    base: str,
    revision: str | None,
) -> MergeReport:
    tensors = tuple(found.record() for found in sums)
    worst = max(tensors, key=lambda x: x.error)
    return MergeReport(
        adapter=str(adapter),
        base=base,
        revision=revision,
        error=ratio(sqrt(sum(x.lost for x in sums)), sqrt(sum(x.ideal for x in sums))),
        worst_error=worst.error,
        worst_module=worst.module,
        dtype=", ".join(sorted({x.dtype for x in tensors})),
        tensors=tensors,
        added=tuple(plan.added),
        bytes=size,
    )
