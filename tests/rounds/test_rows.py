"""What a run finds out of its rows and its base before anything is written."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fedexlora.data.task import stated
from fedexlora.errors import DataError
from fedexlora.flower.node import recipe_for_nodes
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare, prepare_client, prepare_server
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.rounds.conftest import rows


class Notes(Observer):
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def note(self, what):
        self.said.append(what)


@pytest.fixture(scope="module")
def headed(bert, tmp_path_factory):
    """Makes a base with a head of these labels."""

    def make(*labels):
        folder = tmp_path_factory.mktemp("headed")
        names = dict(enumerate(labels))
        config = AutoConfig.from_pretrained(
            bert, num_labels=len(labels), id2label=names, label2id={x: i for i, x in names.items()}
        )
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(bert, config=config)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
        return str(folder)

    return make


def recipe_on(document, base, **tables):
    return parse_recipe({**document, "model": {"source": base}, **tables}, "test")


def accuracy(base, column):
    """The base's own accuracy on the validation rows, by the names of its labels."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    found = rows(16, len("validation"))
    hits = 0
    for row in found:
        with torch.no_grad():
            best = model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item()
        hits += model.config.id2label[best].casefold() == row[column]
    return hits / len(found)


@pytest.mark.parametrize("given", [None, ["x", "y"]])
def test_a_head_keeps_the_order_of_its_own_labels(given, headed, document):
    base, notes = headed("Y", "X"), Notes()
    task = {**document["task"], **({"labels": given} if given else {})}
    recipe = recipe_on(document, base, task=task)
    prepared, _ = prepare(recipe, notes)
    assert prepared.task.model_config["id2label"] == {0: "y", 1: "x"}
    assert prepared.evaluate(Observer())["accuracy"] == accuracy(base, "label")
    assert "labels are in the order of the base model's head: 'y', 'x'" in notes.said


def test_nodes_number_labels_as_the_server_does(headed, document):
    recipe = recipe_on(document, headed("y", "x"))
    prepared, trainer = prepare(recipe, Observer())
    server = prepare_server(
        recipe_on(document, recipe.model.source, task={**document["task"], "labels": ["x", "y"]}),
        Observer(),
    )
    sent = recipe_for_nodes(recipe, stated(server.task).model_dump(mode="json", exclude_none=True))
    assert sent["task"]["labels"] == ["y", "x"]
    own = parse_recipe({**sent, "data": document["data"]}, "sent")
    node = prepare_client(own, "a", None, Observer())
    everyone = [label for name in trainer.num_examples for label in trainer.rows_of(name)["labels"]]
    assert sorted(node.rows_of("a")["labels"]) == sorted(everyone)
    assert node.rows_of("a")["labels"][:2] == [1, 0]  # rows of label x and y
    assert prepared.task.labels == ("y", "x")


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (("good", "bad"), "head has the labels 'good', 'bad'; its outputs are used, in that order"),
        (("LABEL_0", "LABEL_1"), "head has labels without names; its outputs are used"),
    ],
)
def test_a_head_of_other_labels_is_said(labels, note, headed, document):
    notes = Notes()
    prepared, _ = prepare(recipe_on(document, headed(*labels)), notes)
    assert prepared.task.labels == ("x", "y")
    assert note in "\n".join(notes.said)


def test_a_new_head_is_no_news(document):
    notes = Notes()
    prepare(parse_recipe(document, "test"), notes)
    assert notes.said == []


def test_the_header_says_what_was_cut_and_which_client_is_which(document, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = [
        {"text": "w1 w2 w3", "label": "xy"[i % 2], "site": ["東京", "Łódź"][i % 2]}
        for i in range(6)
    ]
    texts[3]["text"] = "w1 " * 20
    for name in ("train", "validation"):
        lines = "\n".join(map(json.dumps, texts[: 6 if name == "train" else 3]))
        (folder / f"{name}.jsonl").write_text(lines)
    tables = {"data": {"source": str(folder)}, "task": {**document["task"], "max_length": 6}}
    tables |= {"federation": {"rounds": 1}}
    notes = Notes()
    run(parse_recipe({**document, **tables}, "test"), tmp_path / "run", observer=notes)
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["clients"] == {"lodz": 3, "site-1": 3}
    assert header["client_values"] == {"lodz": "Łódź", "site-1": "東京"}
    assert header["cut_rows"]["training"] == {"rows": 6, "cut": 1, "answer_end": 0}
    assert header["cut_rows"]["validation"] == {"rows": 3, "cut": 0, "answer_end": 0}
    assert header["notes"] == notes.said
    assert notes.said == ["training: task.max_length = 6 cuts 1 of 6 rows"]


def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(document, tmp_path):
    task = {**document["task"], "max_length": 129}
    with pytest.raises(DataError, match="expected at most 128, the positions that the model has"):
        run(parse_recipe({**document, "task": task}, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
