"""What aggregating, comparing and merging stored adapters found, as JSON."""

from __future__ import annotations

from typing import Literal

from fedexlora.exchange.records import Record


class SourceRecord(Record):
    """One adapter that went in."""

    adapter: str
    """Its folder, as it was named."""
    weight: float
    """Its share of the mean, 0 to 1."""
    missing: tuple[str, ...]
    """Modules that the others have and it has not: zero updates, as was asked for."""
    names: tuple[str, ...] = ()
    """What was done to names of tensors that PEFT would not have matched."""
    zero: bool = False
    """Whether every update is zero, as of an adapter that was never trained."""
    same_as: str | None = None
    """An adapter before it that holds the very same numbers."""


class AdaptedModuleRecord(Record):
    """One module of the result."""

    module: str
    rank: int
    ideal: float
    """Frobenius norm of the weighted mean update, scaled."""
    error: float
    """|result - ideal| / |ideal|, before the result is rounded to float32 factors."""


class AggregationRecord(Record):
    """One adapter made of several."""

    schema_version: int = 1
    method: str
    sources: tuple[SourceRecord, ...]
    base: str
    """The base model, as the adapters name it."""
    rank: int
    """The largest rank of a module."""
    error: float
    """|result - ideal| / |ideal| over all modules."""
    lossless: bool
    """Whether nothing but rounding was left out."""
    modules: tuple[AdaptedModuleRecord, ...]
    dense: tuple[str, ...]
    """Heads and biases, averaged."""
    bytes: int
    """Size of the adapter's tensors."""
    matched_with: str | None = None
    """The class of the base whose layers PEFT matched all tensors with; None if it is not here."""
    tokenizer: tuple[str, ...] = ()
    """Files of the tokenizer that lay beside the adapters, carried over."""


class DeviationModuleRecord(Record):
    """What averaging the factors loses in one module."""

    module: str
    layer: str
    """The part of the module's name up to its layer's number; empty if it has none."""
    projection: str
    """The rest of the name."""
    residual: float
    """Frobenius norm of what the mean of the factors lacks, scaled."""
    ideal: float
    """Frobenius norm of the weighted mean update, scaled."""
    deviation: float
    """residual / ideal."""


class DeviationRecord(Record):
    """What averaging the factors of several adapters loses of their mean update."""

    schema_version: int = 1
    sources: tuple[SourceRecord, ...]
    base: str
    deviation: float
    """Over all modules: the norm of all residuals over that of all mean updates."""
    modules: tuple[DeviationModuleRecord, ...]


class MergedTensorRecord(Record):
    """One tensor of the base that the adapter changed."""

    module: str
    """The layer's path in the model."""
    parameter: str
    """Its weight or its bias."""
    ideal: float
    """Frobenius norm of the change that the adapter asks for."""
    error: float
    """|applied - ideal| / |ideal|: what rounding the sum to the base's dtype loses of it."""
    dtype: str


class MergeReport(Record):
    """One model made of a base and an adapter."""

    schema_version: int = 1
    adapter: str
    """Its folder, as it was named."""
    base: str
    """The base model, as it was named."""
    revision: str | None
    error: float
    """|applied - ideal| / |ideal| over all changed tensors."""
    worst_error: float
    """The largest error of a changed tensor."""
    worst_module: str
    """Where that is."""
    dtype: str
    """Of the changed tensors, as in the base; several are listed."""
    tensors: tuple[MergedTensorRecord, ...]
    added: tuple[str, ...]
    """Heads that the base lacks, in its main dtype; not part of the error."""
    bytes: int
    """Size of all tensors."""


class EvaluationRecord(Record):
    """Scores of something finished on a task's validation rows."""

    schema_version: int = 1
    source: str
    """What was scored, as it was named."""
    kind: Literal["run", "adapter", "model"]
    base: str
    """The model, or that of the adapter."""
    rows: int
    """Validation rows."""
    metrics: dict[str, float]
    recorded: dict[str, float] | None
    """The scores of a run's last round; None for anything else, or another task or rows."""
    scorers: dict[str, dict[str, str]]
    """By metric of generated texts, and the mean of sets: what computes it, and the versions of its
    packages."""


class ExportRecord(Record):
    """What was made of a finished run."""

    schema_version: int = 1
    run: str
    """The name of the run's folder."""
    base: str
    """The base model, as the recipe names it."""
    rounds: int
    rank: int
    """The largest rank of a module."""
    error: float
    """|exported - global model| / |global model|, of the update: what a lower rank leaves out."""
    worst_module: str
    """The module that is farthest from the last version, read back from the adapter's files."""
    worst_error: float
    """How far that is, |exported - last version| / |last version|; includes what is left out."""
    rounding: float
    """The same for what a merged model's dtype rounds away; 0 for an adapter."""
    metrics: dict[str, float]
    """Scores of the run's last round."""
    exported_metrics: dict[str, float] | None
    """Scores of what was exported, loaded again; None if it was not evaluated."""
    pushed_to: str | None
    """Where it was uploaded to."""
