"""Small random-weight models of the real classes, with shapes on which mistakes show."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=90,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=40,
            num_labels=3,
        )
    )


def llama() -> nn.Module:
    """Grouped-query attention: k_proj and v_proj are (12, 24)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=90,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> nn.Module:
    """Conv1D layers: weights are stored (d_in, d_out)."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=24, n_layer=2, n_head=4, n_inner=40))


CASES: dict[str, tuple] = {
    "roberta": (
        roberta,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"], "r": 3}
        | {"lora_alpha": 7, "modules_to_save": ["classifier"]}
        | {"exclude_modules": r".*classifier.*"},
    ),
    "llama-rslora": (
        llama,
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
        | {"r": 4, "lora_alpha": 10, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    ),
    "gpt2-patterns": (
        gpt2,
        {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4}
        | {"lora_alpha": 6, "rank_pattern": {"h.0.attn.c_attn": 2, "c_fc": 5}}
        | {"alpha_pattern": {"h.1.mlp.c_proj": 1, "c_fc": 8}},
    ),
    "roberta-biases": (
        roberta,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2}
        | {"lora_alpha": 5, "bias": "lora_only"},
    ),
}


def adapted(case: str, **changes: object) -> PeftModel:
    """A PEFT model of a case, with weights that depend on nothing but the case."""
    build, options = CASES[case]
    torch.manual_seed(11)
    return get_peft_model(build(), LoraConfig(**(options | changes)))


def lora_layers(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Every LoRA layer by its path in the base model, found without the product's code."""
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight"):
            yield path.removeprefix("base_model.model."), layer
