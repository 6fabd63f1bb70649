"""Small random-weight models of the real classes, with shapes on which mistakes show."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedexlora.algebra.probes import Probes
from fedexlora.peft_bridge.model import AdaptedModel

VOCABULARY = 90


def roberta(layers: int = 2) -> nn.Module:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=40,
            num_labels=3,
        )
    )


def llama(layers: int = 2) -> nn.Module:
    """Grouped-query attention: k_proj and v_proj are (12, 24)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            tie_word_embeddings=False,
        )
    )


def gemma2(layers: int = 2) -> nn.Module:
    """Tied embeddings that are scaled, heads wider than the hidden size."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=40,
            sliding_window=8,
        )
    )


def gpt2(layers: int = 2) -> nn.Module:
    """Conv1D layers, stored (d_in, d_out); the head is tied to the embedding."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=layers, n_head=4, n_inner=40)
    return GPT2LMHeadModel(config)


def vit(layers: int = 2) -> nn.Module:
    """A Conv2d that makes the patches."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=40,
            image_size=12,
            patch_size=4,
            num_labels=3,
        )
    )


def mixtral() -> nn.Module:
    """Mixture of experts, whose weights are three-dimensional."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            num_local_experts=3,
        )
    )


class Convolutions(nn.Module):
    """A strided convolution that is not square in any way, and one along a line."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 10, (3, 2), stride=2, padding=1, **options)
        self.line = nn.Conv1d(10, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.conv(x).flatten(2))


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

LAYERS: dict[str, tuple] = {
    "embedding": (
        llama,
        {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "lm_head", "k_proj"]}
        | {"r": 3, "lora_alpha": 7},
    ),
    "tied-embedding": (
        gemma2,
        {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "o_proj", "v_proj"]}
        | {"r": 3, "lora_alpha": 7, "rank_pattern": {"o_proj": 5}},
    ),
    "tied-head": (
        gpt2,
        {"task_type": "CAUSAL_LM", "target_modules": ["wte", "c_attn"], "r": 3, "lora_alpha": 7},
    ),
    "patches": (
        vit,
        {"target_modules": ["projection", "q_proj"], "r": 3, "lora_alpha": 7}
        | {"modules_to_save": ["classifier"]},
    ),
    "convolutions": (Convolutions, {"target_modules": ["conv", "line"], "r": 2, "lora_alpha": 5}),
    "factor-biases": (
        roberta,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2}
        | {"lora_alpha": 5, "lora_bias": True, "use_rslora": True},
    ),
    "tokens": (
        llama,
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2, "lora_alpha": 5}
        | {"trainable_token_indices": [3, 17, 40]},
    ),
    "pissa": (
        roberta,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "r": 3, "lora_alpha": 7}
        | {"exclude_modules": r".*classifier.*", "init_lora_weights": "pissa"},
    ),
    "olora": (
        llama,
        {"task_type": "CAUSAL_LM", "target_modules": ["k_proj", "down_proj"], "r": 3}
        | {"lora_alpha": 7, "init_lora_weights": "olora"},
    ),
    "orthogonal": (
        roberta,
        {"task_type": "SEQ_CLS", "target_modules": ["query"], "r": 4, "lora_alpha": 7}
        | {"init_lora_weights": "orthogonal"},
    ),
}


EVERY = CASES | LAYERS
"""All cases by name; other tests add theirs."""


def adapted(case: str, dtype: torch.dtype = torch.float32, **changes: object) -> PeftModel:
    """A PEFT model of a case, with weights that depend on nothing but the case."""
    _, options = EVERY[case]
    return get_peft_model(base_of(case, dtype), LoraConfig(**(options | changes)))


def base_of(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The untouched base of a case."""
    build, _ = EVERY[case]
    torch.manual_seed(11)
    return build().to(dtype)


def live_update(model: AdaptedModel, name: str) -> Tensor:
    """What a module adds to its untouched weight, read back from the live model: dense, float64."""
    return model.image(name, Probes(None))


def lora_layers(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Every LoRA layer by its path in the base model, found without the product's code."""
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight"):
            yield path.removeprefix("base_model.model."), layer


def inputs(model: nn.Module, rows: int = 2) -> dict[str, torch.Tensor]:
    """Something to feed a case's model; the same each time."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(3)
    if isinstance(inner, Convolutions):
        return {"x": torch.randn(rows, 4, 9, 8, generator=generator)}
    if isinstance(inner, ViTForImageClassification):
        return {"pixel_values": torch.randn(rows, 3, 12, 12, generator=generator)}
    return {"input_ids": torch.randint(2, VOCABULARY, (rows, 12), generator=generator)}


def logits(model: nn.Module) -> torch.Tensor:
    """What a case's model says about :func:`inputs`."""
    with torch.inference_mode():
        dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
        fed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(model).items()}
        out = model.eval()(**fed)
        return out if isinstance(out, torch.Tensor) else out.logits
