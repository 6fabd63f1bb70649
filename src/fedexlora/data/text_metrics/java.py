"""The two Java programs inside pycocoevalcap: Stanford's PTB tokenizer and METEOR 1.5.

They are started here and not by pycocoevalcap's own wrappers, because those write into the
installed package, and one unusual line end in a text moves all later rows to another row's
references.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from fedexlora.data.score import UncomputedError

UTF8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
PTB = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR = "meteor/meteor-1.5.jar"
METEOR_OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")
LAST_LINE = "end"
SECONDS = 3600.0  # that a program may take; far more than METEOR needs for 5,000 rows


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Each text in lower-case PTB tokens, joined by blanks, without MS-COCO's punctuation marks.

    Raises:
        UncomputedError: the tokenizer failed.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    words = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    command = ["java", *UTF8, "-cp", str(_jar(PTB)), *words]
    # A last line that is not empty, so that empty ones before it are not dropped.
    lines = "\n".join([*map(_one_line, texts), LAST_LINE])
    try:
        done = subprocess.run(
            command, input=_encoded(lines), capture_output=True, check=False, timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UncomputedError(f"the PTB tokenizer failed: {error}") from None
    tokens = done.stdout.decode("utf-8", "replace").rstrip("\n").split("\n")
    if done.returncode or len(tokens) != len(texts) + 1 or tokens[-1] != LAST_LINE:
        raise UncomputedError(
            f"the PTB tokenizer returned {len(tokens)} lines for {len(texts) + 1}, exit code "
            f"{done.returncode}: {done.stderr.decode(errors='replace')[-300:]}"
        )
    marks = set(PUNCTUATIONS)
    return [" ".join(w for w in line.split(" ") if w not in marks) for line in tokens[:-1]]


def meteor(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> float:
    """METEOR 1.5 of the whole corpus, 0 to 1, of tokenized texts.

    Raises:
        UncomputedError: the program failed.
    """
    with _meteor_process() as ask:
        rows = zip(references, predictions, strict=True)
        found = [
            ask(" ||| ".join(["SCORE", *map(_field, [*row, text])]), 1)[0] for row, text in rows
        ]
        answer = ask(" ||| ".join(["EVAL", *found]), len(found) + 1)[-1]
    try:
        return float(answer)
    except ValueError:
        raise UncomputedError(f"METEOR answered {answer[:300]!r}") from None


class _Dialogue:
    """One line to a program, and so many lines back."""

    def __init__(self, write: IO[bytes], read: IO[bytes]) -> None:
        self._write, self._read = write, read

    def __call__(self, line: str, answers: int) -> list[str]:
        try:
            self._write.write(_encoded(line + "\n"))
            self._write.flush()
        except OSError as error:
            raise UncomputedError(f"METEOR ended early: {error}") from None
        found = [self._read.readline() for _ in range(answers)]
        if not all(found):
            raise UncomputedError(f"METEOR ended, or took {SECONDS:.0f} s, before its answer")
        return [x.decode("utf-8", "replace").strip() for x in found]


@contextmanager
def _meteor_process() -> Iterator[_Dialogue]:
    jar = _jar(METEOR)
    command = ["java", *UTF8, "-Xmx2G", "-jar", str(jar), *METEOR_OPTIONS]
    try:
        process = subprocess.Popen(
            command,
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise UncomputedError(f"METEOR does not start: {error}") from None
    assert process.stdin is not None
    assert process.stdout is not None
    limit = threading.Timer(SECONDS, process.kill)
    limit.start()
    try:
        yield _Dialogue(process.stdin, process.stdout)
    finally:
        limit.cancel()
        process.kill()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def _jar(name: str) -> Path:
    spec = find_spec("pycocoevalcap")
    folders = [Path(x) for x in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UncomputedError(f"pycocoevalcap has no {name}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _field(text: str) -> str:
    return _one_line(text.replace("|||", " "))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")
