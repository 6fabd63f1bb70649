"""What a recipe says about evaluation by generation: how texts are written, and their scores."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedexlora.data.answers.table import ANSWER_RULES
from fedexlora.data.text_metrics.table import TEXT_METRICS


class GenerationConfig(BaseModel):
    """How a causal language model is scored by what it writes after the prompts.

    Always the likeliest tokens, or the likeliest beam: nothing is drawn, so that the same model
    writes the same texts again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    metrics: tuple[str, ...] = Field(min_length=1)
    """Scores of the texts against one or more references (`bleu`, ...), or the share of right
    answers by a rule (`gsm8k`, ...); the first is the headline."""
    reference: Annotated[str, Field(min_length=1)] | None = None
    """The column of references or right answers; `task.completion`, or the conversation's last
    answer, if not given."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens of a text; one that has not ended by then is cut, and counted."""
    num_beams: int = Field(default=1, ge=1)
    """Texts that are followed at a time; 1 takes the likeliest token every time."""
    length_penalty: float = Field(default=1.0, allow_inf_nan=False)
    """Power of the length by which a beam's score is divided: above 0, larger favours longer
    texts."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """No sequence of this many tokens is written twice, the prompt's among them; 0 allows all."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A text ends before the first of these, as it does at the end token."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts at a time; changes speed and memory, not results beyond rounding."""

    @model_validator(mode="after")
    def _values_fit_together(self) -> Self:
        known = (*TEXT_METRICS, *ANSWER_RULES)
        if unknown := [name for name in self.metrics if name not in known]:
            raise ValueError(f"metrics: expected some of {', '.join(known)}; found {unknown}")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics: expected each metric once, found {list(self.metrics)}")
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ValueError("length_penalty: has no effect without num_beams; leave it out")
        if self.no_repeat_ngram_size == 1:
            raise ValueError(
                "no_repeat_ngram_size: 1 forbids every token of the prompt; use 0, 2, ..."
            )
        return self
