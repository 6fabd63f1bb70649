"""Rows for each recipe, in the files and with the columns that it reads: made ones, and real ones.

Real ones of data sets that are not at hand have the columns of these and the rows of others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Rows: TypeAlias = list[dict[str, Any]]
Files: TypeAlias = Mapping[str, Rows]
"""Rows by the path of their file."""

COMMONSENSE = {
    "boolq": ("boolq", ("true", "false")),
    "piqa": ("piqa", ("solution1", "solution2")),
    "social_i_qa": ("social_i_qa", ("answer1", "answer2", "answer3")),
    "hellaswag": ("hellaswag", ("ending1", "ending2", "ending3", "ending4")),
    "winogrande": ("winogrande", ("option1", "option2")),
    "arc_easy": ("ARC-Easy", ("answer1", "answer2", "answer3", "answer4")),
    "arc_challenge": ("ARC-Challenge", ("answer1", "answer2", "answer3", "answer4", "answer5")),
    "openbookqa": ("openbookqa", ("answer1", "answer2", "answer3", "answer4")),
}
"""By set: its folder in LLM-Adapters, and possible answers."""
_COMMONSENSE_TRAIN = "ft-training_set/commonsense_170k.json"
_METAMATH = "MetaMathQA-395K.json"
_GLUE = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "rte": ("sentence1", "sentence2"),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "quickstart": ("text",),
}
_TRAIN, _SCORED = 26, 6
_MATH = [
    ("What is $1+1$?", r"Adding, $1+1=\boxed{2}$."),
    (r"Simplify $\frac{2}{4}$.", r"Both are even, so it is $\boxed{\frac{1}{2}}$."),
    ("Solve $x^2=4$ for positive $x$.", r"The root is $x=2$. The answer is $\boxed{2}$."),
    ("What is the interval of $x$ with $0<x\\le 1$?", r"It is $\boxed{(0,1]}$."),
]


def write_files(files: Files, folder: Path) -> None:
    """Write rows as JSON or JSONL, as a path's suffix says."""
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = map(json.dumps, rows)
        text = "\n".join(lines) if path.suffix == ".jsonl" else json.dumps(rows)
        path.write_text(text, encoding="utf-8")


def sources(recipe: str, folder: Path) -> list[str]:
    """What ``--set`` says of local rows, as the headers of the recipes have it."""
    changes = [f"data.source={folder}"]
    if recipe == "chat":
        changes += ["data.train=train", "data.validation=validation"]
    if recipe.startswith("metamath"):
        changes += [f"data.train={_METAMATH}", f"data.validation={_METAMATH}"]
        changes += [f"evaluation.sets.{x}.data.source={folder / x}" for x in ("gsm8k", "math")]
    return changes


def made_files(recipe: str) -> Files:
    """Rows without any meaning."""
    generator = random.Random(recipe)
    if recipe == "chat":
        return _chat([_arithmetic(generator) for _ in range(_TRAIN + _SCORED)])
    if recipe == "e2e":
        train, test = (_descriptions(generator, n) for n in (_TRAIN, _SCORED))
        return {"train.jsonl": train, "test.jsonl": test}
    if recipe == "commonsense":
        tests = {x: [_choice(generator, x) for _ in range(_SCORED)] for x in COMMONSENSE}
        train = [_choice(generator, x) for x in COMMONSENSE for _ in range(_TRAIN // 4)]
        return _commonsense(train, tests)
    if recipe.startswith("metamath"):
        return _metamath([_arithmetic(generator) for _ in range(_TRAIN + _SCORED)])
    label = {"quickstart": ("os", "json", "re"), "stsb": (0.5, 2.25, 4.0)}.get(recipe, (0, 1))
    rows = [
        {column: _words(generator, 5) for column in _GLUE[recipe]}
        | {"topic" if recipe == "quickstart" else "label": label[i % len(label)]}
        for i in range(_TRAIN + _SCORED)
    ]
    return {"train.jsonl": rows[:_TRAIN], "validation.jsonl": rows[_TRAIN:]}


def real_files(recipe: str, data: Path) -> Files:
    """Rows of real data sets."""
    if recipe == "chat":
        return _chat(_read(data, "gsm8k/train", 2 * _TRAIN))
    if recipe == "e2e":
        return {f"{x}.jsonl": _read(data, f"e2e_nlg/{x}", 64) for x in ("train", "test")}
    if recipe == "commonsense":
        held = {"arc_easy": "arc_challenge", "openbookqa": "arc_challenge"}
        tests = {x: _read(data, f"{held.get(x, x)}/test", 64) for x in COMMONSENSE}
        return _commonsense(_read(data, "commonsense_mix/train", 96), tests)
    if recipe.startswith("metamath"):
        return _metamath(_read(data, "gsm8k/train", 96))
    held = {"mrpc": "rte"}.get(recipe, recipe)
    train = "validation" if held == "qnli" else "train"  # its training rows are not at hand
    return {
        "train.jsonl": _read(data, f"{held}/{train}", 96),
        "validation.jsonl": _read(data, f"{held}/validation", 48),
    }


def _read(data: Path, name: str, count: int) -> Rows:
    lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def _words(generator: random.Random, count: int) -> str:
    return " ".join(
        generator.choice(("river", "stone", "of", "Ada's", "naïve")) for _ in "x" * count
    )


def _arithmetic(generator: random.Random) -> dict[str, str]:
    """A row of GSM8K."""
    a, b = generator.randrange(100), generator.randrange(100)
    return {"question": f"What is {a} and {b}?", "answer": f"{a} + {b} = {a + b}.\n#### {a + b}"}


def _metamath(rows: Rows) -> Files:
    """Rows of GSM8K as training rows, as the test of GSM8K, and a few of MATH's kind."""
    asked = [
        {"type": "GSM_Rephrased", "original_question": row["question"], "query": row["question"]}
        | {"response": row["answer"].replace("####", "The answer is:")}
        for row in rows
    ]
    math = [{"problem": x, "level": "Level 1", "type": "x", "solution": y} for x, y in _MATH]
    return {_METAMATH: asked, "gsm8k/test.jsonl": rows[:_SCORED], "math/test.jsonl": math}


def _choice(generator: random.Random, name: str) -> dict[str, str]:
    """A row as LLM-Adapters writes it."""
    answers = COMMONSENSE[name][1]
    offered = " ".join(f"{x.title()}: {_words(generator, 2)}" for x in answers)
    text = f"Please choose the correct answer: {_words(generator, 4)}\n\n{offered}"
    right = generator.choice(answers)
    return {
        "instruction": f"{text}\n\nAnswer format: {'/'.join(answers)}",
        "input": "",
        "output": f"the correct answer is {right}",
        "answer": right,
    }


def _commonsense(train: Rows, tests: Files) -> Files:
    return {_COMMONSENSE_TRAIN: train} | {
        f"dataset/{COMMONSENSE[name][0]}/test.json": rows for name, rows in tests.items()
    }


def _descriptions(generator: random.Random, count: int) -> Rows:
    """Every second row has the attributes of the one before it."""
    made = []
    for i in range(count):
        name = f"The {_words(generator, 1)} {i // 2}"
        row = {"meaning_representation": f"name[The Vaults {i // 2}], area[riverside]"}
        made.append(
            row | {"human_reference": f"{name} is by the river, near {_words(generator, 6)}."}
        )
    return made


def _chat(rows: Rows) -> Files:
    """Rows of GSM8K as conversations: some with a system's turn, some with a tool that counts."""
    made = []
    for i, row in enumerate(rows):
        number = row["answer"].rsplit("####", 1)[1].strip()
        turns = [("user", row["question"]), ("assistant", row["answer"])]
        if i % 2:
            turns = [("system", "Count with the tool."), turns[0], ("assistant", "count()")]
            turns += [("tool", number), ("assistant", f"It is {number}.")]
        if i % 3:
            turns += [("user", "Sure?"), ("assistant", "Yes.")]
        made.append({"messages": [{"role": who, "content": said} for who, said in turns]})
    return {"train.jsonl": made[:_TRAIN], "validation.jsonl": made[_TRAIN : _TRAIN + _SCORED]}
