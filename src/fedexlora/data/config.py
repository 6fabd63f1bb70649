"""What a recipe says about its data set, its division among clients, and its task.

Plain values that are checked when they are made; nothing here reads a file or loads a library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

ClassificationMetric: TypeAlias = Literal["accuracy", "f1", "matthews", "loss"]
RegressionMetric: TypeAlias = Literal["pearson", "spearman", "mse", "loss"]
CausalLMMetric: TypeAlias = Literal["loss", "perplexity"]
Column: TypeAlias = Annotated[str, Field(min_length=1)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataConfig(_Config):
    """Where the training and validation rows come from, and how many of them are used."""

    source: str = Field(min_length=1)
    """A folder with one file per split, or the name of a data set on the hub."""
    config: str | None = None
    """The hub data set's configuration, e.g. "cola" of "glue"; not used for a folder."""
    revision: str | None = None
    """The hub's branch, tag or commit; the default branch if not given; not used for a folder."""
    train: str = Field(default="train", min_length=1)
    """The training split: a hub split, or a file of the folder with or without its suffix."""
    validation: str = Field(default="validation", min_length=1)
    """The split that every metric is measured on; named as `train` is."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Use a random subset of this many training rows; all rows if not given."""
    max_validation_rows: int | None = Field(default=None, gt=0)
    """Use a random subset of this many validation rows; all rows if not given."""


class IidPartition(_Config):
    """Every client gets an equal random share of the training rows."""

    kind: Literal["iid"] = "iid"
    """Selects this way of dividing the rows."""
    clients: int = Field(ge=1)
    """Number of clients."""


class DirichletPartition(_Config):
    """Each label's rows are divided by proportions drawn from a Dirichlet distribution."""

    kind: Literal["dirichlet"] = "dirichlet"
    """Selects this way of dividing the rows."""
    clients: int = Field(ge=1)
    """Number of clients."""
    alpha: float = Field(gt=0, allow_inf_nan=False)
    """Concentration: small values (0.1) give clients very different labels, large ones similar."""
    column: Column | None = None
    """The column whose values are divided; the task's label column if not given."""
    min_rows: int = Field(default=1, ge=1)
    """Fewest rows of a client; the proportions are drawn again until every client has them."""


class ByColumnPartition(_Config):
    """One client for every distinct value of a column: a division that the data already has."""

    kind: Literal["by_column"] = "by_column"
    """Selects this way of dividing the rows."""
    column: Column
    """The column that names a row's client."""


PartitionConfig: TypeAlias = Annotated[
    IidPartition | DirichletPartition | ByColumnPartition, Field(discriminator="kind")
]
"""How the training rows are divided among the clients; `kind` selects one of three."""


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


class ClassificationTask(_Task):
    """Predict one of several labels for a text or a pair of texts."""

    kind: Literal["classification"] = "classification"
    """Selects this task."""
    text: Column | tuple[Column, Column]
    """The text column, or the two columns of a pair of texts."""
    label: Column = "label"
    """The column of labels: text, whole numbers or booleans."""
    labels: tuple[str | int, ...] | None = Field(default=None, min_length=2)
    """All labels, in the model's order; the data set's own label names, or the sorted values of the
    training split, if not given."""
    metrics: tuple[ClassificationMetric, ...] = ("accuracy",)
    """What is measured on the validation split; the first one is the headline."""
    max_length: int = Field(default=128, ge=1)
    """Most tokens of a row; longer ones are truncated on the right."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if self.labels is not None and len({str(x) for x in self.labels}) != len(self.labels):
            raise ValueError(f"labels: expected each label once, found {list(self.labels)}")
        return self


class RegressionTask(_Task):
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


class CausalLMTask(_Task):
    """Predict a text's tokens, or those of a completion after a prompt."""

    kind: Literal["causal-lm"] = "causal-lm"
    """Selects this task."""
    text: Column | None = None
    """The text column, every token of which is a target; excludes `prompt` and `completion`."""
    prompt: Column | None = None
    """The column of prompts, no token of which is a target; needs `completion`."""
    completion: Column | None = None
    """The column of completions; they follow the prompt directly and end with the end token."""
    prompt_template: str = "{prompt}"
    """What the model reads before the completion; `{prompt}` stands for the prompt column."""
    max_length: int = Field(default=256, ge=2)
    """Most tokens of a row; a prompt loses its beginning first, a text or completion its end."""
    metrics: tuple[CausalLMMetric, ...] = ("loss", "perplexity")
    """What is measured on the validation split; the first one is the headline."""

    @model_validator(mode="after")
    def _one_way_to_get_text(self) -> Self:
        given = [x for x in ("text", "prompt", "completion") if getattr(self, x) is not None]
        if given not in (["text"], ["prompt", "completion"]):
            found = " and ".join(f"`{x}`" for x in given) or "none of them"
            raise ValueError(f"expected either `text`, or `prompt` and `completion`; found {found}")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"prompt_template: expected it to contain {{prompt}}, "
                f"found {self.prompt_template!r}"
            )
        if self.text is not None and self.prompt_template != "{prompt}":
            raise ValueError("prompt_template: has no effect with `text`; leave it out")
        return self


TaskConfig: TypeAlias = Annotated[
    ClassificationTask | RegressionTask | CausalLMTask, Field(discriminator="kind")
]
"""What the model learns to do; `kind` selects one of three."""
