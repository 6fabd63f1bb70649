"""A small GPT-2 that has learned E2E's task, from scratch, on half of its meaning representations.

That half names no ``eatType`` (coffee shop, pub, restaurant); the other one, on which clients
fine-tune the base, does. So they have something to teach it, as with a pre-trained model and a task
of their own. Everything follows from the data set and seeds; the weights are made anew wherever
they are missing, and are no part of the repository.

    python -m benchmarks.results.e2e_base --data FOLDER --work FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SEED = 0
PROMPT, REFERENCE = "meaning_representation", "human_reference"
END = "<|endoftext|>"
KIND = "eatType"
PROMPTS = 100
"""Meaning representations of the test split, of 630, that texts are written for."""


@dataclass(frozen=True)
class BaseRecipe:
    """How large the base is, and how long it is trained."""

    vocabulary: int = 2000
    width: int = 192
    layers: int = 4
    heads: int = 4
    positions: int = 192
    rows: int = 8_000
    """Training rows, drawn from the base's half; each is seen once."""
    batch: int = 8
    learning_rate: float = 2e-3

    @property
    def name(self) -> str:
        """The base's folder; another recipe's has another name."""
        return f"e2e_base_{hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]}"


FULL = BaseRecipe()
SMOKE = BaseRecipe(vocabulary=500, width=64, layers=2, heads=2, rows=400)


def rows_name(prompts: int | None) -> str:
    """The folder of rows of which so many meaning representations are scored."""
    return f"e2e_rows_{prompts or 'all'}"


def prepare_rows(data: Path, work: Path, prompts: int | None) -> Path:
    """Write the base's rows, the clients' and those that are scored; return their folder.

    ``base.jsonl`` and ``train.jsonl`` are the training split's meaning representations without and
    with an ``eatType``; ``test.jsonl`` is of the test split, which all have one. It is a
    column of the rows, so that clients can be divided by it.

    Args:
        data: the folder of the data sets.
        work: where the folder is made, unless it is there.
        prompts: how many distinct meaning representations are scored, each with all of its
            references; all of the test split if None.
    """
    folder = work / rows_name(prompts)
    made = [folder / f"{name}.jsonl" for name in ("base", "train", "test")]
    if all(path.exists() for path in made):
        return folder
    rows, test = (
        [row | {KIND: _kind(row[PROMPT])} for row in _read(data / "e2e_nlg" / f"{name}.jsonl")]
        for name in ("train", "test")
    )
    every = sorted({row[PROMPT] for row in test})
    scored = {every[i] for i in np.random.default_rng(SEED).permutation(len(every))[:prompts]}
    parts = (
        [row for row in rows if row[KIND] is None],
        [row for row in rows if row[KIND] is not None],
        [row for row in test if row[PROMPT] in scored],
    )
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(made, parts, strict=True):
        _write(path, part)
    return folder


def prepare_base(rows: Path, work: Path, recipe: BaseRecipe) -> Path:
    """Train the base and its tokenizer, unless they are there; return their folder.

    Args:
        rows: the folder that `prepare_rows` returned.
        work: where the folder is made.
        recipe: what is trained.
    """
    folder = work / recipe.name
    if folder.exists():
        return folder
    begun, examples = time.perf_counter(), _read(rows / "base.jsonl")
    order = np.random.default_rng(SEED).permutation(len(examples))
    examples = [examples[i] for i in order[: recipe.rows]]
    tokenizer = _tokenizer(examples, recipe.vocabulary)
    model, loss = _trained(examples, tokenizer, recipe)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    seconds = round(time.perf_counter() - begun, 1)
    about = asdict(recipe) | {"loss": loss, "seconds": seconds}
    about["parameters"] = model.num_parameters()
    (part / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    part.rename(folder)
    return folder


def _tokenizer(examples: Iterable[dict], vocabulary: int):
    """Byte-level BPE as GPT-2's, with merges of the base's own rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (row[name] for row in examples for name in (PROMPT, REFERENCE))
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END
    )


def _trained(examples: Sequence[dict], tokenizer, recipe: BaseRecipe):
    """A model trained on completions alone, and its mean training loss."""
    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedexlora.data.causal_lm import CausalLM
    from fedexlora.data.config import CausalLMTask
    from fedexlora.local.trainer import TrainerJob

    task = CausalLM(
        CausalLMTask(
            prompt=PROMPT,
            completion=REFERENCE,
            prompt_template="{prompt}\n",
            max_length=recipe.positions,
        )
    )
    end = tokenizer.eos_token_id
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            n_positions=recipe.positions,
            bos_token_id=end,
            eos_token_id=end,
            resid_pdrop=0.0,  # no row is seen twice
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    job = TrainerJob(
        {
            "num_train_epochs": 1,
            "per_device_train_batch_size": recipe.batch,
            "learning_rate": recipe.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 100,
            "weight_decay": 0.01,
            "label_smoothing_factor": 0.1,
            "use_cpu": True,
        },
        task.collator(tokenizer),
    )
    rows = task.tokenize(Dataset.from_list(list(examples)), tokenizer)
    return model, job.train(model, rows, seed=SEED, round_=1, on_step=_shown).loss


def _shown(done: int, steps: int) -> None:
    if done % 50 == 0 or done == steps:
        print(f"base: step {done} of {steps}", flush=True)


def _kind(prompt: str) -> str | None:
    found = re.search(r"eatType\[([^\]]*)\]", prompt)
    return found[1] if found else None


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Iterable[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def main() -> None:
    """Make the rows and the base."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    rows = prepare_rows(given.data, given.work, PROMPTS)
    print(prepare_base(rows, given.work, FULL))


if __name__ == "__main__":
    main()
