"""Federated LoRA fine-tuning whose aggregation is exact, and measured.

What people use stands here, and is loaded when it is first used, so that importing the package
stays light. Beside it ``fedexlora.flower`` is for those who have a Flower app of their own; other
modules may change their names.

Runs:

    load_recipe          a recipe from its file, checked
    run                  a recipe, from data to adapter, in this process
    evaluate             the scores of a finished run, an adapter or a model on a recipe's task
    export_run           a finished run as an adapter or a merged model, with a model card

Adapters that are there already:

    aggregate_adapters   the exact weighted mean of adapters, as one adapter
    compress_adapter     one adapter at a lower rank, optimally
    deviation            what averaging the factors of adapters would lose
    merge_adapter        an adapter merged into its base model's files

What these take: ``Recipe``, ``ExportOptions``, and an ``Observer``, which is told what happens in a
run while it happens. What they return: ``RunResult``, with a ``RoundRecord`` for every round, made
of ``ClientRecord``, ``LeftOutRecord``, ``CertificateRecord``, ``ModuleRecord`` and ``BytesRecord``;
``AggregationRecord``, ``DeviationRecord``, ``MergeReport``, ``ExportRecord``, ``EvaluationRecord``.

Errors, all of them ``FedexLoraError``:

    InputError           what was given is wrong: ``RecipeError``, ``DataError``, ``BridgeError``,
                         ``AdapterError``, ``ResumeError``
    RunError             a run failed: ``NoUpdatesError``, ``DivergenceError``, ``ExactnessError``
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "AggregationRecord",
    "BridgeError",
    "BytesRecord",
    "CertificateRecord",
    "ClientRecord",
    "DataError",
    "DeviationRecord",
    "DivergenceError",
    "EvaluationRecord",
    "ExactnessError",
    "ExportOptions",
    "ExportRecord",
    "FedexLoraError",
    "InputError",
    "LeftOutRecord",
    "MergeReport",
    "ModuleRecord",
    "NoUpdatesError",
    "Observer",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "RoundRecord",
    "RunError",
    "RunResult",
    "__version__",
    "aggregate_adapters",
    "compress_adapter",
    "deviation",
    "evaluate",
    "export_run",
    "load_recipe",
    "merge_adapter",
    "run",
]

if TYPE_CHECKING:
    from fedexlora.adapters.aggregate import aggregate_adapters, compress_adapter
    from fedexlora.adapters.deviation import deviation
    from fedexlora.adapters.evaluation import evaluate
    from fedexlora.adapters.export import ExportOptions, export_run
    from fedexlora.adapters.merge import merge_adapter
    from fedexlora.errors import (
        AdapterError,
        BridgeError,
        DataError,
        DivergenceError,
        ExactnessError,
        FedexLoraError,
        InputError,
        NoUpdatesError,
        RecipeError,
        ResumeError,
        RunError,
    )
    from fedexlora.exchange.adapter_records import (
        AggregationRecord,
        DeviationRecord,
        EvaluationRecord,
        ExportRecord,
        MergeReport,
    )
    from fedexlora.exchange.records import (
        BytesRecord,
        CertificateRecord,
        ClientRecord,
        LeftOutRecord,
        ModuleRecord,
        RoundRecord,
    )
    from fedexlora.rounds.loop import RunResult
    from fedexlora.rounds.observer import Observer
    from fedexlora.rounds.recipe import Recipe, load_recipe
    from fedexlora.rounds.run import run

_HOMES = {
    "adapters.aggregate": "aggregate_adapters compress_adapter",
    "adapters.deviation": "deviation",
    "adapters.evaluation": "evaluate",
    "adapters.export": "ExportOptions export_run",
    "adapters.merge": "merge_adapter",
    "errors": "AdapterError BridgeError DataError DivergenceError ExactnessError FedexLoraError "
    "InputError NoUpdatesError RecipeError ResumeError RunError",
    "exchange.adapter_records": "AggregationRecord DeviationRecord EvaluationRecord ExportRecord "
    "MergeReport",
    "exchange.records": "BytesRecord CertificateRecord ClientRecord LeftOutRecord ModuleRecord "
    "RoundRecord",
    "rounds.loop": "RunResult",
    "rounds.observer": "Observer",
    "rounds.recipe": "Recipe load_recipe",
    "rounds.run": "run",
}
"""The names that stand here, by the module that has them."""
_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
