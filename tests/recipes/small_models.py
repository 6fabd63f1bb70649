"""Small random-weight models of the recipes' own classes, each with a tokenizer of bytes.

Grouped-query attention and heads that are wider than the hidden size: no adapted matrix is square.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

MODELS = {
    "chat": "qwen3",
    "commonsense": "llama",
    "e2e": "gpt2",
    "metamath-gemma-2-9b": "gemma2",
    "metamath-mistral-7b": "mistral",
    "quickstart": "bert",
} | dict.fromkeys(("cola", "mrpc", "qnli", "rte", "sst2", "stsb"), "roberta")
"""By recipe, the kind of its model."""

_ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_ENCODER |= {"intermediate_size": 48, "max_position_embeddings": 520, "initializer_range": 0.2}
_DECODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
_DECODER |= {"num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 48}
_DECODER |= {"max_position_embeddings": 2048, "initializer_range": 0.2}
_SPECIAL = {
    "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
    "roberta": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    | {"cls_token": "<s>", "sep_token": "</s>"},
    "gpt2": {"eos_token": "<|endoftext|>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}
_ADDED = {"qwen3": ["<|im_start|>"]}


def small_model(kind: str, folder: Path) -> None:
    """Write a model of a kind and its tokenizer to a folder."""
    tokenizer = _tokenizer(kind)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    _model(kind, tokenizer).save_pretrained(folder)


def _model(kind: str, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ends}
    match kind:
        case "bert":
            return BertModel(BertConfig(**_ENCODER, **sizes))
        case "roberta":
            return RobertaForMaskedLM(RobertaConfig(**_ENCODER, **sizes))
        case "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=256, **sizes)
            )
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**_DECODER, **sizes, tie_word_embeddings=True))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**_DECODER, **sizes))
        case "gemma2":
            two = _DECODER | {"num_hidden_layers": 2}  # with a sliding window, and without one
            return Gemma2ForCausalLM(Gemma2Config(**two, **sizes, sliding_window=64))
        case _:
            return Qwen3ForCausalLM(Qwen3Config(**_DECODER, **sizes))


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Bytes with a few merges; it begins and ends texts as those of its kind do."""
    special = _SPECIAL[kind]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[*dict.fromkeys(special.values()), *_ADDED.get(kind, ())],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(["Please choose the correct answer to the question:"], trainer)
    begin, end = special.get("cls_token"), special.get("sep_token")
    if end is not None:
        single, pair = f"{begin} $A {end}", f"{begin} $A {end} $B {end}"
    elif "bos_token" in special:
        begin = special["bos_token"]
        single, pair = f"{begin} $A", f"{begin} $A $B"
    else:
        single = pair = ""
    if single:
        ids = [(x, inner.token_to_id(x)) for x in dict.fromkeys((begin, end)) if x is not None]
        inner.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=ids
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
