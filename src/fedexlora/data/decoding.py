"""Texts that a model writes after prompts: batched, padded on the left, nothing drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from fedexlora.data.batches import Progress, evaluating
from fedexlora.data.generation_config import GenerationConfig
from fedexlora.data.prompts import NO_FRAME, AnswerFrame


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote after one prompt."""

    text: str
    """Without the prompt, an opening, the end token, and what a stop string begins."""
    finished: bool
    """Whether it came to an end before ``max_new_tokens``."""


def write_texts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    progress: Progress | None = None,
    frame: AnswerFrame = NO_FRAME,
) -> list[Written]:
    """The likeliest text after each prompt, longest prompts first.

    Args:
        model: on any device, in any mode; with or without an adapter; left as it was.
        prompts: token ids of each prompt, at least one token.
        tokenizer: the model's; left as it was.
        config: how texts are written.
        progress: called after each batch with the prompts done and all prompts.
        frame: what stands around an answer.

    Returns:
        One for each prompt, in their order.
    """
    # Adapters sit in the layers: the model inside writes as the whole one does, and PEFT's own
    # `generate` would leave its traces on it.
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    ends = _end_tokens(inner, tokenizer) | frame.ends
    stops = (*config.stop, *frame.stops)
    options = _options(config, ends, tokenizer)
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    written: dict[int, Written] = {}
    with evaluating(model), _no_options_of_its_own(inner), torch.inference_mode():
        for start in range(0, len(order), config.batch_size):
            chosen = order[start : start + config.batch_size]
            ids, mask = _padded([prompts[i] for i in chosen], options.pad_token_id)
            tokens = inner.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=options,
                stopping_criteria=_stops(tokenizer, stops, frame, ids.shape[1]),
            )
            for i, row in zip(chosen, tokens[:, ids.shape[1] :].tolist(), strict=True):
                written[i] = _read(row, ends, tokenizer, stops, frame)
            if progress is not None:
                progress(len(written), len(prompts))
    return [written[i] for i in range(len(prompts))]


def _options(
    config: GenerationConfig, ends: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> transformers.GenerationConfig:
    beams = {"length_penalty": config.length_penalty} if config.num_beams > 1 else {}
    return transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **beams,
    )


@contextmanager
def _no_options_of_its_own(model: Any) -> Iterator[None]:  # noqa: ANN401 - any model that generates
    """Without the options that a model's files may have, such as sampling or penalties."""
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:  # noqa: ANN401
    """The tokenizer's end token, which rows are trained to end with, and those of the model."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return frozenset(x for x in found if x is not None)


def _stops(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], frame: AnswerFrame, prompt: int
) -> StoppingCriteriaList:
    """Ends a text that holds one of some strings, whatever tokens they are made of.

    transformers' own criterion refuses tokenizers that join words by spaces.
    """

    def holds_one(input_ids: Tensor, *_: Tensor, **__: Any) -> Tensor:  # noqa: ANN401
        """Of token ids ``(n, tokens)``, which rows are done, ``(n,)`` bool."""
        texts = (decoded(tokenizer, row) for row in input_ids[:, prompt:].tolist())
        done = [not frame.opens(x) and bool(_places(frame.answer(x), stop)) for x in texts]
        return torch.tensor(done, device=input_ids.device)

    return StoppingCriteriaList([holds_one] if stop else [])


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, ``(n, tokens)`` int64 both, padded on the left."""
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _read(
    tokens: Sequence[int],
    ends: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[str],
    frame: AnswerFrame,
) -> Written:
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = frame.answer(decoded(tokenizer, tokens[:length]))
    stops = _places(text, stop)
    finished = length < len(tokens) or bool(stops)
    return Written(text[: min(stops, default=len(text))].strip(), finished)


def _places(text: str, stop: Sequence[str]) -> list[int]:
    """Where in a text each of the strings that end it begins, of those that it holds."""
    return [at for at in map(text.find, stop) if at >= 0]
