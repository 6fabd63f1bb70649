"""Which layers get factors, and which rank: our rules against PEFT's own functions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from fedexlora.peft_bridge.names import targets

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.v_proj",
    "model.layers.1.mlp.experts.0.w1",
    "encoder.block.2.layer.0.SelfAttention.q",
    "lm_head",
    "q_proj",
]
ENDS = ["q_proj", "self_attn.v_proj", "w1", "q", "lm_head", "proj", "model.layers.0"]
PATTERNS = [r".*\.layers\.1.*", r".*(q|v)_proj", r"q_proj", r".*experts.*"]
wanted = st.one_of(st.lists(st.sampled_from(ENDS), max_size=4), st.sampled_from(PATTERNS))


@given(
    st.sampled_from(NAMES),
    wanted,
    st.one_of(st.none(), wanted),
    st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 11), max_size=3)),
    st.one_of(st.none(), st.sampled_from(["layers", "block", ["layers", "block"]])),
    st.one_of(st.none(), st.just(["lm_head"])),
)
def test_targets_are_those_that_peft_finds(name, target, exclude, layers, pattern, heads):
    if isinstance(target, str) or layers is None:
        layers = pattern = None
    settings = {
        "target_modules": target,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": pattern if layers else None,
        "modules_to_save": heads,
    }
    found = check_target_module_exists(LoraConfig(**settings), name)
    assert targets(settings, name) == bool(found)
