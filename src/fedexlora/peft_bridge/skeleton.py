"""A model without weights: its layers and parameters, and how its files name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import PreTrainedModel

from fedexlora.errors import AdapterError
from fedexlora.peft_bridge.adapter_file import AdapterFile
from fedexlora.peft_bridge.base_files import CONFIG, BaseFiles

_AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
"""The models of PEFT's tasks."""
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device: everything but numbers."""

    model: PreTrainedModel
    config: Any
    """The configuration of the whole model; transformers does not type its fields."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of everything that the model stores, by its name in the model."""
    shared: Mapping[str, tuple[str, ...]]
    """The parameters that are one tensor with others, and those others."""

    @property
    def class_name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def prefix(self) -> str:
        """What stands before every name of the body in a model with a head."""
        return str(self.model.base_model_prefix)

    @property
    def has_head(self) -> bool:
        """Whether the model is more than a body."""
        return self.model.base_model is not self.model

    def layer(self, name: str) -> nn.Module | None:
        """A layer by its path; None if there is none."""
        try:
            layer: nn.Module = self.model.get_submodule(name)
        except AttributeError:
            return None
        return layer

    def loaded_as(self, names: Iterable[str]) -> dict[str, str | None]:
        """The parameter that each name of a file is loaded as, by transformers' own rules.

        None stands for what is converted first, as experts that are stacked; names that the
        model has no place for are left out.
        """
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        found: dict[str, str | None] = {}
        # Some renamings are active only after the first of their names came by, in this order.
        for name in sorted(names):
            args = (self.prefix, self.shapes)
            target, converted = rename_source_key(name, renamings, converters, *args)
            if target not in self.shapes and name in self.shapes:
                target, converted = name, None
            if target in self.shapes:
                found[name] = None if converted else target
        return found

    def save_config(self, folder: Path) -> None:
        """Write the model's ``config.json``."""
        # One of a text model inside a larger one does not describe the files.
        if type(self.model.config) is type(self.config):
            self.config.architectures = [self.class_name]
        # `save_pretrained` refuses what old configurations say about generation.
        self.config.to_json_file(folder / CONFIG)


def build_skeleton(
    files: BaseFiles, adapter: AdapterFile, changes: Mapping[str, Any] | None = None
) -> Skeleton:
    """The model that an adapter belongs to, with as many labels as its head has rows.

    Its class follows from the adapter's task, else from the class that PEFT noted, else from
    the base's ``architectures``.

    Args:
        files: of the base.
        adapter: decides on the class and the labels.
        changes: to the base's configuration, such as names of labels.

    Raises:
        AdapterError: if transformers knows no such model.
    """
    try:
        config = AutoConfig.from_pretrained(
            files.folder, trust_remote_code=False, **(changes or {})
        )
        model = _weightless(config, adapter)
        labels, tokens = _labels(model, adapter), _vocabulary(model, adapter)
        if labels is not None:
            config.num_labels = labels
        if tokens is not None:
            config.get_text_config().vocab_size = tokens
        if labels is not None or tokens is not None:
            model = _weightless(config, adapter)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise AdapterError(
            f"{files.folder}: transformers cannot make the model that {adapter.folder} belongs to",
            [str(error)],
        ) from error
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    return Skeleton(model, config, shapes, _shared(model))


def _weightless(config: Any, adapter: AdapterFile) -> PreTrainedModel:  # noqa: ANN401
    task = adapter.config.get("task_type")
    with torch.device("meta"):
        if task:
            if task not in _AUTO:
                raise ValueError(f"task_type: expected one of {', '.join(_AUTO)}, found {task!r}")
            auto = _AUTO[task]
            # Models of pictures and texts are trained as language models, and are none to "auto".
            if type(config) in auto._model_mapping or task not in _GENERATING:
                model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
                return model
        noted = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
        name = noted or next(iter(config.architectures or ()), None)
        made = getattr(transformers, name or "", None)
        if not (isinstance(made, type) and issubclass(made, PreTrainedModel)):
            raise ValueError(f"no task fits, and {name!r} is no model of transformers")
        built: PreTrainedModel = made(config)
        return built


def _labels(model: PreTrainedModel, adapter: AdapterFile) -> int | None:
    """How many labels the adapter's head has, where that is not what the configuration says."""
    known = model.config.num_labels
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {
        spec.shape[0]
        for name, spec in adapter.dense.items()
        for shape in (shapes.get(name, ()),)
        if shape[:1] == (known,) and spec.shape[1:] == shape[1:] and spec.shape != shape
    }
    return found.pop() if len(found) == 1 else None


def _vocabulary(model: PreTrainedModel, adapter: AdapterFile) -> int | None:
    """How many rows the adapter's own embedding has, where tokens were added to the base's."""
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    if known is None:
        return None
    table = model.get_input_embeddings()
    name = next((n for n, module in model.named_modules() if module is table), None)
    stored = (f"{name}.weight", f"{name}.base_layer.weight")
    rows = {adapter.dense[key].shape[0] for key in stored if key in adapter.dense}
    return rows.pop() if len(rows) == 1 and rows != {known} else None


def _shared(model: nn.Module) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(x for x in group if x != name)
        for group in names.values()
        for name in group
        if len(group) > 1
    }
