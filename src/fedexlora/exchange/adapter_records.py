"""What aggregating, comparing and merging stored adapters found, as JSON."""

from __future__ import annotations

from fedexlora.exchange.records import Record


class SourceRecord(Record):
    """One adapter that went in."""

    adapter: str
    """Its folder, as it was named."""
    weight: float
    """Its share of the mean, 0 to 1."""
    missing: tuple[str, ...]
    """Modules that the others have and it has not: zero updates, as was asked for."""


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
