"""Local training: nothing of it stays on the model, and a step is a step however it is cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import LlamaConfig, LlamaForSequenceClassification

from fedexlora.errors import BridgeError, RecipeError
from fedexlora.local.trainer import Collator, TrainerJob
from fedexlora.peft_bridge.isolation import isolation
from tests.models import VOCABULARY, llama, roberta

LENGTHS = [3, 9, 5, 7, 4, 8, 6]
BASE = {"use_cpu": True, "max_grad_norm": 0.0, "optim": "sgd", "weight_decay": 0.0}
BASE |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}


def sequence_llama(labels: int) -> nn.Module:
    """Its loss takes the number of targets, where that of RoBERTa ignores it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=labels,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


def sequence_roberta(labels: int) -> nn.Module:
    model = roberta(1)
    model.config.num_labels = model.num_labels = labels
    model.classifier.out_proj = nn.Linear(24, labels)
    return model


BUILDERS = {"roberta": sequence_roberta, "llama": sequence_llama}
CASES = [
    *[(kind, model) for kind in ("classification", "regression") for model in BUILDERS],
    ("causal-lm", "llama"),
]


def build(kind: str, name: str) -> PeftModel:
    torch.manual_seed(5)
    labels = {"classification": 3, "regression": 1}
    base = llama(1) if kind == "causal-lm" else BUILDERS[name](labels[kind])
    base.config.problem_type = "regression" if kind == "regression" else None
    targets = ["q_proj", "v_proj"] if name == "llama" else ["query", "value"]
    task = "CAUSAL_LM" if kind == "causal-lm" else "SEQ_CLS"
    model = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=5, target_modules=targets, task_type=task)
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def make_rows(kind: str) -> Dataset:
    """Rows of unequal lengths; of a language model's, unequally many tokens are predicted."""
    draw = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in LENGTHS]
    labels: list = [i % 3 for i in range(len(ids))]
    if kind == "regression":
        labels = [0.3 * i - 1.0 for i in range(len(ids))]
    if kind == "causal-lm":
        labels = [[-100] * (1 + i % 2) + row[1 + i % 2 :] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": LENGTHS})


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    pad = lambda x, value: [*x, *[value] * (longest - len(x))]  # noqa: E731
    labels = [row["labels"] for row in rows]
    if isinstance(labels[0], list):
        labels = [pad(x, -100) for x in labels]
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor(labels),
    }


def train(model: nn.Module, rows: Dataset, options: dict, collator: Collator = collate) -> None:
    job = TrainerJob(options, collator)
    job.train(model, rows, seed=1, round_=1, on_step=lambda done, steps: None)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def oracle(model: nn.Module, rows: Dataset, kind: str, step: int, rate: float) -> float:
    """Plain float64 gradient descent on the mean over all targets of a step; the mean loss."""
    losses = []
    for start in range(0, len(rows), step):
        batch = collate([rows[i] for i in range(start, min(start + step, len(rows)))])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if kind == "regression":
            loss = mse_loss(logits.squeeze(-1), labels.double())
        elif kind == "causal-lm":
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            loss = cross_entropy(logits, labels)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= rate * parameter.grad
        losses.append(loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("batch", "steps"), [(4, 1), (1, 3), (2, 100)])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_step_is_one_batch_however_it_is_accumulated(kind, name, batch, steps):
    model, rows = build(kind, name), make_rows(kind)
    exact, before = copy.deepcopy(model).double().train(), trained(model)
    options = {**BASE, "learning_rate": 0.2, "per_device_train_batch_size": batch}
    options |= {"gradient_accumulation_steps": steps}
    told = []
    done = TrainerJob(options, collate).train(
        model, rows, seed=1, round_=1, on_step=lambda *step: told.append(step)
    )
    in_all = -(-len(rows) // (batch * steps))
    assert told == [(k, in_all) for k in range(1, in_all + 1)]
    assert (done.steps, done.rows) == (in_all, len(rows))
    wanted = oracle(exact, rows, kind, batch * steps, 0.2)
    assert done.loss == pytest.approx(wanted, rel=1e-5)
    after = trained(exact)
    error = sum(float((x - after[n]).square().sum()) for n, x in trained(model).items())
    moved = sum(float((x - after[n]).square().sum()) for n, x in before.items())
    assert error <= 1e-8 * moved


def facts(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Everything that is to be seen of a model but its trained values, without our code."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            yield f"{path}.{name}", (id(value), type(value))
            if isinstance(value, dict):
                yield f"{path}.{name}: keys", tuple((k, id(x)) for k, x in value.items())
        config = getattr(module, "config", None)
        yield f"{path}: config", config and repr(config.to_dict())
    for path, parameter in model.named_parameters():
        yield path, (parameter.requires_grad, parameter.grad, parameter.dtype)
    for path, buffer in model.named_buffers():
        yield path, buffer.tolist()
    backends = torch.backends
    yield "products", (backends.fp32_precision, backends.cuda.matmul.fp32_precision)
    yield "cudnn", (backends.cudnn.deterministic, backends.cudnn.benchmark)
    yield "deterministic", torch.are_deterministic_algorithms_enabled()


USES = {
    "plain": {},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "all": {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 3,
        "neftune_noise_alpha": 5.0,
        "full_determinism": True,
        "schedule": "run",
    },
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("use", USES)
def test_nothing_of_training_stays_on_the_model(use, fails):
    model, rows = build("causal-lm", "llama"), make_rows("causal-lm")
    model.eval()
    fresh, before, start = copy.deepcopy(model), dict(facts(model)), trained(model)
    calls = []

    def failing(batch: list[dict]) -> dict[str, torch.Tensor]:
        calls.append(batch)
        if fails and len(calls) > 5:
            raise RuntimeError("a broken row")
        return collate(batch)

    options = {**BASE, "learning_rate": 0.2, "per_device_train_batch_size": 1, **USES[use]}
    try:
        train(model, rows, options, failing)
    except RuntimeError:
        assert fails
    after = dict(facts(model))
    assert [name for name in before if before[name] != after.get(name)] == []
    assert after.keys() == before.keys()
    values = trained(model)
    assert any(not torch.equal(x, start[name]) for name, x in values.items()), "it trained"
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if name in values:
                parameter.copy_(values[name])
        batch = collate(rows.to_list())
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)


class Running(nn.Module):
    """A layer of somebody's own that counts, and keeps a running mean, while it is trained."""

    def __init__(self, inner: nn.Module, *, persistent: bool = True) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.zeros(24), persistent=persistent)

    def forward(self, *args: object, **options: object) -> torch.Tensor:
        x = self.inner(*args, **options)
        if self.training:
            self.mean.lerp_(x.detach().flatten(0, -2).mean(0), 0.1)
        return x


def test_a_frozen_statistic_that_moves_fails_the_update_by_name_and_is_put_back():
    model, rows = build("causal-lm", "llama"), make_rows("causal-lm")
    inner = model.base_model.model.model
    inner.norm = Running(inner.norm)
    with pytest.raises(BridgeError, match=r"model\.norm\.mean: this Running changes it"):
        train(model, rows, BASE)
    assert not inner.norm.mean.any()
    inner.norm = Running(inner.norm.inner, persistent=False)
    train(model, rows, BASE)
    assert not inner.norm.mean.any(), "what no file holds is put back without a word"


def test_a_frozen_weight_that_is_written_fails_the_update_by_name():
    model = build("causal-lm", "llama")
    head = model.base_model.model.lm_head.weight
    with pytest.raises(BridgeError, match=r"lm_head\.weight: a frozen weight"), isolation(model):
        head.add_(1.0)


def test_a_rehearsal_changes_nothing_and_says_what_fails():
    model, rows = build("causal-lm", "llama"), make_rows("causal-lm")
    start = trained(model)
    TrainerJob({**BASE, "learning_rate": 0.5, "num_train_epochs": 9}, collate).rehearse(model, rows)
    assert all(torch.equal(x, start[name]) for name, x in trained(model).items())
    beyond = Dataset.from_list(
        [{**row, "input_ids": [VOCABULARY] * row["length"]} for row in rows.to_list()]
    )
    with pytest.raises(RecipeError, match="index out of range"):
        TrainerJob(BASE, collate).rehearse(model, beyond)
    with pytest.raises(RecipeError, match="galore_torch"):
        TrainerJob({**BASE, "optim": "galore_adamw"}, collate).rehearse(model, rows)
    with torch.no_grad():
        model.base_model.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RecipeError, match="the loss of its first step is nan"):
        TrainerJob(BASE, collate).rehearse(model, rows)
