"""The code of a model card: loads what was exported on its base, and asks it once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedexlora.adapters.card_source import Source
from fedexlora.adapters.markdown import literal
from fedexlora.data.config import (
    CausalLMTask,
    ChatTask,
    ClassificationTask,
    RegressionTask,
    TaskConfig,
)
from fedexlora.data.template import fill, placeholders
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.recipe_tables import ModelTable

_LOADERS: Mapping[str, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "chat": "AutoModelForCausalLM",
}
_ANSWER = (
    "inputs = inputs.to(model.device)",
    "answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]",
    'print(tokenizer.decode(answer[inputs["input_ids"].shape[1] :]))',
)


def usage(recipe: Recipe, labels: tuple[str, ...], folder: str, *, merged: bool) -> str:
    """A program that loads the model as it was scored, and asks it once.

    Args:
        recipe: of the run.
        labels: the names of the classes, in the model's order; none for other tasks.
        folder: what was exported, as its user names it: a path or a name of the hub.
        merged: whether that is a full model.
    """
    loader = _LOADERS[recipe.task.kind]
    source = Source.of(recipe.model.source, recipe.model.revision)
    here = f"folder = {literal(folder)}" + ("  # where this file is" if folder == "." else "")
    lines = _imports(recipe, source, loader, merged=merged)
    if merged:
        lines += [here, f'model = {loader}.from_pretrained(folder, dtype="{recipe.model.dtype}")']
        lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
        lines += _labels(labels)
    else:
        lines += [*source.code("base_name"), here, *_labels(labels)]
        keywords = [*source.keywords(), *_precision(recipe.model, recipe.lora)]
        lines += [f"base = {loader}.from_pretrained(", "    base_name,"]
        lines += [f"    {word}," for word in [*keywords, *_heads(recipe.task, labels)]]
        revision = "".join(f", {word}" for word in source.keywords())
        lines += [
            ")",
            "model = PeftModel.from_pretrained(base, folder)",
            f"tokenizer = AutoTokenizer.from_pretrained(base_name{revision})",
        ]
    return "\n".join([*lines, "", *_question(recipe.task)])


def _imports(recipe: Recipe, source: Source, loader: str, *, merged: bool) -> list[str]:
    quantised = ", BitsAndBytesConfig" if recipe.model.quantization and not merged else ""
    lines = ["import torch"]
    if not merged:
        lines.append("from peft import PeftModel")
    lines.append(f"from transformers import {loader}, AutoTokenizer{quantised}")
    if source.kind == "package" and not merged:
        lines.insert(0, "from importlib.resources import files\n")
    return [*lines, ""]


def _labels(labels: tuple[str, ...]) -> list[str]:
    return [f"labels = [{', '.join(map(literal, labels))}]"] if labels else []


def _heads(task: TaskConfig, labels: tuple[str, ...]) -> list[str]:
    """What a new head of the base has to be like, as keyword arguments."""
    if labels:
        return [
            "num_labels=len(labels)",
            "id2label=dict(enumerate(labels))",
            "label2id={label: number for number, label in enumerate(labels)}",
        ]
    if isinstance(task, RegressionTask):
        return ["num_labels=1", 'problem_type="regression"']
    return []


def _precision(model: ModelTable, lora: Mapping[str, Any]) -> list[str]:
    """How the base is stored, as keyword arguments: another precision is another base."""
    words = [f'dtype="{model.dtype}"']
    if model.quantization is None:
        return words
    from fedexlora.peft_bridge.load import quantization_fields

    whole = lora.get("modules_to_save") or ()
    fields = quantization_fields(model.quantization, model.dtype, whole)
    told = ", ".join(f"{key}={_value(value)}" for key, value in fields.items())
    return [*words, f"quantization_config=BitsAndBytesConfig({told})"]


def _value(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return literal(value) if isinstance(value, str) else repr(value)


def _question(task: TaskConfig) -> list[str]:
    """One row through tokenizer and model, and what comes out."""
    if isinstance(task, CausalLMTask):
        begin = "How it begins"
        if task.text is None:
            columns = {name: [begin] for name in placeholders(task.prompt_template)}
            (begin,) = fill(task.prompt_template, columns, 1)
        return [
            f"text = {literal(begin)}",
            'inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)',
            *_ANSWER,
        ]
    if isinstance(task, ChatTask):
        given = task.chat_template
        return [
            *([f"tokenizer.chat_template = {literal(given)}"] if given else []),
            'conversation = [{"role": "user", "content": "A question"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True,',
            '    tokenizer_kwargs={"return_token_type_ids": False},',
            ")",
            *_ANSWER,
        ]
    pair = not isinstance(task.text, str)
    texts = '"A first text", "A second text"' if pair else '"A text"'
    lines = [
        "inputs = tokenizer(",
        f'    {texts}, truncation=True, max_length={task.max_length}, return_tensors="pt",',
        *([] if pair else ["    return_token_type_ids=False,"]),
        ")",
        "inputs = inputs.to(model.device)",
        "with torch.inference_mode():",
        "    logits = model(**inputs).logits[0]",
    ]
    if isinstance(task, ClassificationTask):
        shares = "dict(zip(labels, logits.softmax(-1).tolist(), strict=True))"
        return [*lines, f"print({shares})"]
    return [*lines, "print(logits.item())"]
