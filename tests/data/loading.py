"""A task's model, as a run loads it."""

from __future__ import annotations

from transformers import PreTrainedModel

from fedexlora.data.task import Task
from fedexlora.peft_bridge.load import load_base


def model_for(task: Task, path: str, pad_token_id: int | None = None) -> PreTrainedModel:
    config = dict(task.model_config)
    if pad_token_id is not None:
        config["pad_token_id"] = pad_token_id
    model, _ = load_base(path, None, task.peft_task_type, config, seed=1)
    return model
