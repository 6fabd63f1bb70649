"""What holds for a whole run and is not in its recipe: ``run.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedexlora.errors import ResumeError
from fedexlora.exchange.digest import tensors_digest
from fedexlora.exchange.layout import dense_tensors
from fedexlora.exchange.version import adapter_digest
from fedexlora.rounds.environment import describe_environment
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.observer import RunInfo
from fedexlora.rounds.prepared import Prepared


def check_header(folder: RunFolder, header: Mapping[str, Any] | None, prepared: Prepared) -> None:
    """Refuse to go on with a run on other data, or with another model.

    Raises:
        ResumeError: naming what differs.
    """
    if header is None:
        return
    here = {"data": prepared.data_fingerprint, "base": prepared.base, **prepared.stated()}
    faults = [
        f"{key}: {header.get(key)} there, {value} here"
        for key, value in here.items()
        if header.get(key) != value
    ]
    if faults:
        raise ResumeError(f"{folder.path} was started on other data or another base model", faults)


def run_header(
    prepared: Prepared, rows: Mapping[str, int], initial_metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What holds for the whole run and is not in its recipe."""
    return {
        **describe_environment(prepared.model),
        "data": prepared.data_fingerprint,
        "base": prepared.base,
        **prepared.stated(),
        "initial": _initial(prepared),
        "precision": prepared.precision,
        "weights": _weights(prepared),
        "arithmetic": prepared.arithmetic,
        "clients": dict(rows),
        **prepared.summed_up(),
        "validation_rows": prepared.validation_rows,
        "headline": prepared.recipe.headline,
        "scorers": prepared.scorers(),
        "model_config": {} if prepared.task is None else dict(prepared.task.model_config),
        "initial_metrics": dict(initial_metrics),
    }


def _initial(prepared: Prepared) -> dict[str, str]:
    """Digests of what the run starts from: of runs that are to be compared, they are the same."""
    state = prepared.initial()
    return {
        "adapter": adapter_digest(state.adapter),
        "heads": tensors_digest(dense_tensors(state.dense)),
    }


def run_info(prepared: Prepared, header: Mapping[str, Any], finished: int) -> RunInfo:
    """What is known before the first round."""
    return RunInfo(
        method=prepared.recipe.method.name,
        rounds=prepared.recipe.federation.rounds,
        clients=header["clients"],
        validation_rows=header["validation_rows"],
        modules=len(prepared.spec.modules),
        precision=header["precision"],
        trained_parameters=prepared.trained_parameters,
        headline=header["headline"],
        initial_metrics=header["initial_metrics"],
        finished=finished,
        device=prepared.device,
    )


def _weights(prepared: Prepared) -> dict[str, float]:
    """By module, the norm of its frozen weight; nothing where the server has no model."""
    if prepared.model is None:
        return {}
    from fedexlora.peft_bridge.base_norms import base_norms

    return base_norms(prepared.model)
