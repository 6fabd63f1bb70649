"""The ``[training]`` table: transformers' ``TrainingArguments``, and all that is known of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from fedexlora.errors import RecipeError
from fedexlora.local.own_keys import (
    DEVICE_NAMES,
    OWN_KEYS,
    OwnKeys,
    is_device_name,
    library_options,
    stated_device,
)
from fedexlora.local.schedule import rate_of_step, schedule_faults
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.device import find_device
from fedexlora.peft_bridge.isolation import process_settings
from fedexlora.peft_bridge.options import option_faults

_DEFAULTS: Mapping[str, Any] = {
    "num_train_epochs": 1,
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
    "logging_strategy": "no",
}
_FIXED: Mapping[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    # With the filter on, a step whose loss is NaN would count as 0 and go unnoticed.
    "logging_nan_inf_filter": False,
}
_SCORED = [
    "do_eval",
    "do_predict",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "batch_eval_metrics",
    "include_for_metrics",
    "prediction_loss_only",
    "metric_for_best_model",
    "greater_is_better",
]
_CHECKPOINTED = [
    "save_steps",
    "save_total_limit",
    "save_only_model",
    "save_on_each_node",
    "enable_jit_checkpoint",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
]
_DISTRIBUTED = [
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "parallelism_config",
    "local_rank",
    "ddp_backend",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_timeout",
]
_PUSHED = [
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_always_push",
    "hub_revision",
]
_RESERVED: Mapping[str, str] = {
    "output_dir": "it is --out",
    "seed": "it is federation.seed",
    "data_seed": "it follows from federation.seed",
    "do_train": "every client trains",
    "resume_from_checkpoint": "it is --resume",
    "load_best_model_at_end": "clients send what they have at the end of a round",
    "per_device_eval_batch_size": "it is evaluation.batch_size",
    "bf16_full_eval": "it is evaluation.dtype",
    "fp16_full_eval": "it is evaluation.dtype",
    "length_column_name": "rows have their length",
    "label_names": "it follows from the task",
    "use_liger_kernel": "it changes transformers for the whole process, scoring included",
    "liger_kernel_config": "it changes transformers for the whole process, scoring included",
    **dict.fromkeys(_SCORED, "the global model is scored every round"),
    **dict.fromkeys(_CHECKPOINTED, "runs are checkpointed every round"),
    **dict.fromkeys(_DISTRIBUTED, "a client trains in one process, on one device"),
    **dict.fromkeys(_PUSHED, "nothing is pushed from local training"),
    **dict.fromkeys(_FIXED, "it is fixed"),
}
_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "torch_empty_cache_steps",
)
_ABOVE_ZERO = ("learning_rate", "num_train_epochs")


@dataclass
class _OnOneDevice(TrainingArguments):  # type: ignore[misc] # transformers is untyped here
    """``TrainingArguments`` for one device, which it is told and does not look for.

    Left to itself it takes the first GPU, and with more of them in sight `Trainer` takes as many
    times larger batches and spreads them over all, by ``nn.DataParallel``.
    """

    place: str = "cpu"

    @cached_property
    def _setup_devices(self) -> torch.device:
        """The device, for `Trainer` and for accelerate."""
        AcceleratorState._reset_state(reset_partial_state=True)
        self.distributed_state = PartialState(cpu=self.use_cpu)
        device = torch.device(self.place)
        self.distributed_state.device = device
        self._n_gpu = 0 if device.type == "cpu" else 1
        return device


def arguments(options: Mapping[str, Any], *, seed: int, folder: str) -> TrainingArguments:
    """What ``Trainer`` is given: the recipe's options, on one device.

    Args:
        options: the ``[training]`` table.
        seed: of dropout and of the order of rows.
        folder: where callbacks may write.

    Raises:
        RecipeError: if this machine has not the device.
        ValueError: if a value cannot be, or not on this machine.
    """
    stated = stated_device(options)
    device = find_device(stated)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what asks for a GPU without naming one means this one
    # A processor that was not asked for is no place for an arithmetic that means a GPU.
    merged = {**_DEFAULTS, **library_options(options), **_FIXED, "use_cpu": stated == "cpu"}
    with process_settings():  # TrainingArguments sets how the whole process multiplies
        return _OnOneDevice(
            output_dir=folder, seed=seed, data_seed=seed, place=str(device), **merged
        )


def training_faults(options: Mapping[str, Any]) -> list[str]:
    """Every fault of a recipe's ``[training]`` table, whatever device this machine has.

    A run is exported, scored and looked at where it could not be trained.
    """
    own = {key: value for key, value in options.items() if key in OWN_KEYS}
    faults = option_faults(
        "training", own, OwnKeys, {}, lambda: OwnKeys(**own), lambda _: _device_faults(options)
    )
    return faults + option_faults(
        "training",
        library_options(options),
        TrainingArguments,
        _RESERVED,
        lambda: _check(options),
        lambda given: [*_range_faults(given), *schedule_faults(options)],
        beside=OWN_KEYS,
    )


def check_training_device(options: Mapping[str, Any]) -> None:
    """Refuse to train on a device or in an arithmetic that this machine has not.

    Raises:
        RecipeError: saying which.
    """
    try:
        _made(options)
    except ValueError as error:
        raise RecipeError("this machine cannot train so", [f"training: {error}"]) from error


def training_arithmetic(options: Mapping[str, Any]) -> Arithmetic:
    """How ``Trainer`` will multiply."""
    return Arithmetic.of_training(_made(options))


def full_batches_only(options: Mapping[str, Any]) -> int:
    """The rows that a client must have because smaller batches are dropped; else 0."""
    made = _made(options)
    return int(made.per_device_train_batch_size) if made.dataloader_drop_last else 0


def _made(options: Mapping[str, Any]) -> TrainingArguments:
    return arguments(options, seed=0, folder=tempfile.gettempdir())


def _made_anywhere(options: Mapping[str, Any]) -> TrainingArguments:
    """As on a machine that has device and arithmetic: every processor has bf16; TF32 is a GPU's."""
    try:
        return _made(options)
    except (ValueError, RecipeError):
        elsewhere = {**options, "device": "cpu"}
        elsewhere.pop("tf32", None)
        return _made(elsewhere)


def _check(options: Mapping[str, Any]) -> None:
    """Raise what ``Trainer`` would before its first step, on some machine.

    Raises:
        ValueError: if a value cannot be, or the process is one of several.
        ImportError: if a package is not installed.
    """
    made = _made_anywhere(options)
    if made.world_size > 1:
        raise ValueError(
            f"this is one of {made.world_size} processes of a distributed launcher; a client "
            f"trains in one process, on one device: start fedexlora without the launcher"
        )
    for callback in get_reporting_integration_callbacks(made.report_to):
        try:
            callback()
        except RuntimeError as error:  # transformers' word for a package that is not there
            raise ImportError(f"report_to = {options.get('report_to')!r}: {error}") from error
    if options.get("schedule") == "run":
        rate_of_step(made, 1)


def _device_faults(options: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the name of the device, on any machine."""
    name = options.get("device", "auto")
    if not is_device_name(name):
        yield f"device: expected {DEVICE_NAMES}; found {name!r}"
    elif options.get("use_cpu") is True and name not in ("auto", "cpu"):
        yield f"device: {name!r} is not use_cpu = true; give one of the two"


def _range_faults(options: Mapping[str, Any]) -> Iterator[str]:
    """What ``TrainingArguments`` takes and means nothing, or fails at some step; by key."""
    for key, value in options.items():
        if key in _AT_LEAST_ONE and value is not None and value < 1:
            yield f"{key}: expected at least 1, found {value}"
        if key in _ABOVE_ZERO and value <= 0:
            yield f"{key}: expected a number above 0, found {value}"
    most = options.get("max_steps", -1)
    if most != -1 and most < 1:
        yield f"max_steps: expected at least 1, or -1 for no limit; found {most}"
