"""What the shell offers after Tab; nothing here loads PyTorch, so that it comes at once.

Keys and methods are listed again, because the modules that define them need PyTorch; a test holds
the lists against them.
"""

from __future__ import annotations

METHODS = (
    "fedex",
    "fedit",
    "ffa",
    "rolora",
    "fedsa",
    "fedrot",
    "fedavgm",
    "flora",
    "florist",
    "flexlora",
    "rbla",
    "hetlora",
    "fedmomentum",
    "fedsvd",
    "fedadam_factored",
    "lorafair_ridge",
    "frlora",
    "lora_a2",
    "centralised",
    "local_only",
)
_TABLES = {
    "model": "source revision dtype quantization",
    "task": "kind text label labels prompt completion prompt_template completion_template messages "
    "chat_template max_length metrics generation choices",
    "data": "source config revision train validation max_train_rows max_validation_rows",
    "partition": "kind clients alpha column min_rows",
    "method": "name next_adapter remainder_rank remainder_energy heads strength momentum rate "
    "momentum_rank energy period beta1 beta2 tau ridge local_rank",
    "federation": "placement reduce_on clients_per_round fraction min_updates deadline stale "
    "weighting weight_cap robust clip_norm bad_share history allow exclude rounds patience seed",
    "evaluation": "where holdout every batch_size dtype sets mean",
    "tracking": "trackers project",
}
KEYS = tuple(f"{table}.{key}" for table, keys in _TABLES.items() for key in keys.split())
_OPEN = ("lora.", "training.", "training.schedule=", "training.device=")
"""Tables whose keys are those of PEFT and transformers, and the keys in them that are ours."""


def override(incomplete: str) -> list[str]:
    """``table.key=`` of a recipe, and the methods after ``method.name=``."""
    key, equals, _ = incomplete.partition("=")
    if equals:
        known = [f"{key}={name}" for name in METHODS] if key == "method.name" else []
    else:
        known = [*(f"{name}=" for name in KEYS), *_OPEN]
    return [name for name in known if name.startswith(incomplete)]
