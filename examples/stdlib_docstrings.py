"""Write a small text-classification data set that every machine with Python has.

The rows are the documentation strings of the standard library, each labelled with what its module
is for. Names that give the label away (the module's own, and dotted paths) are blanked out.

    python examples/stdlib_docstrings.py data/docstrings
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TOPICS = {
    "asyncio": ["asyncio"],
    "code": ["importlib", "inspect", "ast", "dis", "typing", "tokenize", "traceback", "pydoc"],
    "concurrency": ["multiprocessing", "concurrent", "threading", "subprocess", "queue"],
    "email": ["email", "mailbox", "smtplib", "imaplib", "poplib"],
    "files": ["shutil", "pathlib", "tempfile", "zipfile", "tarfile", "os"],
    "numbers": ["statistics", "fractions", "random", "_pydecimal", "datetime", "_pydatetime"],
    "testing": ["unittest", "doctest", "pdb", "bdb", "trace"],
    "web": ["http", "urllib", "xml", "html", "wsgiref", "xmlrpc", "socketserver", "ftplib"],
}
WORDS_IN_A_ROW = 24


def docstrings(path: Path) -> Iterator[str]:
    """The first paragraphs of every documentation string in one file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text:
            yield from (part for part in text.split("\n\n")[:3] if len(part.split()) >= 6)


def rows(library: Path) -> Iterator[dict[str, str]]:
    """Every distinct text with its topic and the module that it is from."""
    seen: set[str] = set()
    for topic, modules in TOPICS.items():
        for module in modules:
            for file in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
                if not file.exists() or "test" in file.parts:
                    continue
                for text in docstrings(file):
                    clean = " ".join(blank(text, module).split()[:WORDS_IN_A_ROW])
                    if clean not in seen:
                        seen.add(clean)
                        yield {"text": clean, "topic": topic, "module": module}


def blank(text: str, module: str) -> str:
    """``text`` without the name of its module and without dotted paths."""
    text = re.sub(r"\b\w+(\.\w+)+\b", "_", text)
    return re.sub(rf"\b{re.escape(module)}\w*", "_", text, flags=re.IGNORECASE)


def main(folder: Path, per_topic: int = 130, held_out: float = 0.23) -> None:
    """Write ``train.jsonl`` and ``validation.jsonl``, balanced over the topics."""
    by_topic: dict[str, list[dict[str, str]]] = {topic: [] for topic in TOPICS}
    for row in rows(Path(sysconfig.get_paths()["stdlib"])):
        by_topic[row["topic"]].append(row)
    generator = random.Random(0)
    train, validation = [], []
    for found in by_topic.values():
        picked = generator.sample(found, min(per_topic, len(found)))
        cut = int(len(picked) * held_out)
        validation += picked[:cut]
        train += picked[cut:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("validation", validation)):
        generator.shuffle(part)
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(train)} training and {len(validation)} validation rows in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
