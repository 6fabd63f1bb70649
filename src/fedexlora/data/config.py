"""What a recipe says about its data set and its task.

Plain values that are checked when they are made; nothing here reads a file or loads a library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from fedexlora.data.generation_config import GenerationConfig
from fedexlora.data.partition_config import Column
from fedexlora.data.template import placeholders

ClassificationMetric: TypeAlias = Literal["accuracy", "f1", "matthews", "loss"]
RegressionMetric: TypeAlias = Literal["pearson", "spearman", "mse", "loss"]
CausalLMMetric: TypeAlias = Literal["loss", "perplexity"]

CHOICE_ACCURACY = "choice_accuracy"
"""The share of rows whose right answer is the likeliest."""
LONGEST_CHAT_TEMPLATE = 100_000
"""Characters of a chat template; the longest ones of published models have a third of that."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataConfig(_Config):
    """Where the training and validation rows come from, and how many of them are used."""

    source: str = Field(min_length=1)
    """A folder with each split's files, or that `save_to_disk` wrote, or the name of a data set on
    the hub."""
    config: str | None = None
    """The hub data set's configuration, e.g. "cola" of "glue"; not used for a folder."""
    revision: str | None = None
    """The hub's branch, tag or commit; the default branch if not given; not used for a folder."""
    train: str = Field(default="train", min_length=1)
    """The training split: a hub split, or in the folder a file with or without its suffix, the name
    of numbered parts or of a folder of parts, or a pattern such as "train-*.parquet"."""
    validation: str = Field(default="validation", min_length=1)
    """The split that every metric is measured on; named as `train` is."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Use a random subset of this many training rows; all rows if not given."""
    max_validation_rows: int | None = Field(default=None, gt=0)
    """Use a random subset of this many validation rows; all rows if not given."""


class _Task(_Config):
    if TYPE_CHECKING:  # every task declares its own, after `kind`, with the metrics that it has
        metrics: tuple[str, ...]

    @model_validator(mode="after")
    def _metrics_are_listed_once(self) -> Self:
        if not self.metrics:
            raise ValueError("metrics: expected at least one, found none")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics: expected each metric once, found {list(self.metrics)}")
        return self

    @property
    def headline(self) -> str:
        """The metric that runs are compared by: the first one listed."""
        return self.metrics[0]


class _TextTask(_Task):
    if TYPE_CHECKING:
        text: Column | tuple[Column, Column]
        label: Column

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        texts = (self.text,) if isinstance(self.text, str) else self.text
        return tuple(dict.fromkeys((*texts, self.label)))


class ClassificationTask(_TextTask):
    """Predict one of several labels for a text or a pair of texts."""

    kind: Literal["classification"] = "classification"
    """Selects this task."""
    text: Column | tuple[Column, Column]
    """The text column, or the two columns of a pair of texts."""
    label: Column = "label"
    """The column of labels: text, whole numbers or booleans."""
    labels: tuple[StrictBool | str | int, ...] | None = Field(default=None, min_length=2)
    """All labels, in the model's order; the data set's own label names, or the sorted values of the
    training split, if not given. A base model whose head has the same names keeps its own order."""
    metrics: tuple[ClassificationMetric, ...] = ("accuracy",)
    """What is measured on the validation split; the first one is the headline."""
    max_length: int = Field(default=128, ge=1)
    """Most tokens of a row; longer ones are truncated on the right."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if self.labels is not None and len({str(x) for x in self.labels}) != len(self.labels):
            raise ValueError(f"labels: expected each label once, found {list(self.labels)}")
        return self


class RegressionTask(_TextTask):
    """Predict a number for a text or a pair of texts."""

    kind: Literal["regression"] = "regression"
    """Selects this task."""
    text: Column | tuple[Column, Column]
    """The text column, or the two columns of a pair of texts."""
    label: Column = "label"
    """The column of numbers."""
    metrics: tuple[RegressionMetric, ...] = ("pearson", "spearman")
    """What is measured on the validation split; the first one is the headline."""
    max_length: int = Field(default=128, ge=1)
    """Most tokens of a row; longer ones are truncated on the right."""


class ChoicesConfig(_Config):
    """How rows are scored by which of their possible answers the model finds likeliest."""

    answers: tuple[Column, ...] = Field(min_length=2)
    """All possible answers; a row has those that its prompt names."""
    template: str = "{choice}"
    """The completion that an answer makes; `{choice}` stands for it."""
    reference: Column | None = None
    """The column of right answers; the task's `completion` if not given."""

    @model_validator(mode="after")
    def _template_has_the_choice(self) -> Self:
        if placeholders(self.template) != ("choice",):
            raise ValueError(f"template: expected {{choice}} in it, found {self.template!r}")
        return self


class _LanguageTask(_Task):
    if TYPE_CHECKING:
        generation: GenerationConfig | None

    @property
    def headline(self) -> str:
        """The metric that runs are compared by: of what is generated, if anything is."""
        return (self.generation or self).metrics[0]


class CausalLMTask(_LanguageTask):
    """Predict a text's tokens, or those of a completion after a prompt."""

    kind: Literal["causal-lm"] = "causal-lm"
    """Selects this task."""
    text: Column | None = None
    """The text column, every token of which is a target; excludes prompts and completions."""
    prompt: Column | None = None
    """The column of prompts, no token of which is a target."""
    completion: Column | None = None
    """The column of completions; they follow the prompt directly and end with the end token."""
    prompt_template: str = "{prompt}"
    """What the model reads before the completion: `{prompt}` stands for the prompt column,
    `{NAME}` for the column NAME, `{{` and `}}` for braces."""
    completion_template: str = "{completion}"
    """What the model learns to write: `{completion}` stands for the completion column, the rest is
    as in `prompt_template`."""
    max_length: int = Field(default=256, ge=2)
    """Most tokens of a row; a prompt loses its beginning first, a text or completion its end."""
    metrics: tuple[CausalLMMetric, ...] = ("loss", "perplexity")
    """What is measured on the validation split; the first one is the headline."""
    generation: GenerationConfig | None = None
    """How the texts that the model writes are scored; nothing is generated if not given."""
    choices: ChoicesConfig | None = None
    """How rows are scored by the likeliest of their possible answers; not so if not given."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return tuple(dict.fromkeys(self.main_columns + self.template_columns))

    @property
    def main_columns(self) -> tuple[str, ...]:
        """The columns that need a text in every row."""
        return tuple(x for x in (self.text, self.prompt, self.completion) if x is not None)

    @property
    def template_columns(self) -> tuple[str, ...]:
        """The columns that the templates name, where a row may have nothing."""
        if self.text is not None:
            return ()
        named = {"prompt": self.prompt, "completion": self.completion}
        templates = (self.prompt_template, self.completion_template)
        names = (named.get(x) or x for template in templates for x in placeholders(template))
        return tuple(x for x in dict.fromkeys(names) if x not in self.main_columns)

    @model_validator(mode="after")
    def _one_way_to_get_text(self) -> Self:
        pair = ("prompt", "completion")
        given = [x for x in ("text", *pair) if getattr(self, x) is not None]
        if self.choices is not None and self.completion is None:
            raise ValueError("choices: they take the place of a `completion`; name its column")
        if self.text is not None:
            for key in ("prompt_template", "completion_template"):
                # A resolved recipe states every default.
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: has no effect with `text`; leave it out")
            if self.generation is not None:
                raise ValueError("generation: needs prompts, which `text` has none of")
        templated = [x for x in pair if self._stands_alone(x)]
        if given != ["text"] and ("text" in given or set(given) | set(templated) != set(pair)):
            found = " and ".join(f"`{x}`" for x in given) or "none of them"
            raise ValueError(f"expected either `text`, or `prompt` and `completion`; found {found}")
        return self

    def _stands_alone(self, part: str) -> bool:
        """Whether a part's template makes it without the column of that name.

        Raises:
            ValueError: if the template cannot be read, or lacks the column that is given for it.
        """
        key = f"{part}_template"
        template, column = getattr(self, key), getattr(self, part)
        try:
            names = placeholders(template)
        except ValueError as error:
            raise ValueError(f"{key}: {error}; found {template!r}") from None
        if column is not None and part not in names and column not in names:
            raise ValueError(f"{key}: expected it to contain {{{part}}}, found {template!r}")
        return bool(names) and part not in names


class ChatTask(_LanguageTask):
    """Predict the assistant's turns of conversations, written by the model's chat template."""

    kind: Literal["chat"] = "chat"
    """Selects this task."""
    messages: Column = "messages"
    """The column of conversations: lists of messages with `role` and `content`, or ShareGPT's with
    `from` and `value`."""
    chat_template: str | None = None
    """The Jinja template that writes a conversation; the tokenizer's own if not given. A recipe's
    file may name a file that ends in `.jinja` instead."""
    max_length: int = Field(default=1024, ge=2)
    """Most tokens of a conversation; a longer one loses its end."""
    metrics: tuple[CausalLMMetric, ...] = ("loss", "perplexity")
    """What is measured on the validation split; the first one is the headline."""
    generation: GenerationConfig | None = None
    """How the last answers that the model writes are scored; nothing is generated if not given."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (self.messages,)

    @model_validator(mode="after")
    def _template_is_a_template(self) -> Self:
        given = self.chat_template
        if given is None:
            return self
        if len(given) > LONGEST_CHAT_TEMPLATE:
            raise ValueError(
                f"chat_template: expected at most {LONGEST_CHAT_TEMPLATE:,} characters, "
                f"found {len(given):,}"
            )
        if "{{" not in given and "{%" not in given:
            raise ValueError(
                "chat_template: expected a Jinja template, or in a recipe's file the name of a "
                f"file that ends in .jinja; found {given[:80]!r}"
            )
        return self


TaskConfig: TypeAlias = Annotated[
    ClassificationTask | RegressionTask | CausalLMTask | ChatTask, Field(discriminator="kind")
]
"""What the model learns to do; `kind` selects one of four."""
