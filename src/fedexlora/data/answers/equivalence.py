"""Whether mathematical answers are equal, decided by math-verify in processes that can be killed.

math-verify ends a long comparison by a signal, which works in a main thread only and does not stop
every computation (math-verify #65). Here each comparison runs in another process, which is killed
when its time is up and replaced.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from fedexlora.data.answers.equivalence_worker import DIFFERENT, EQUAL, READY
from fedexlora.errors import RunError

START = 120.0  # seconds that a process may take to load math-verify
WORKER = "fedexlora.data.answers.equivalence_worker"


def equal_answers(
    pairs: Sequence[tuple[str, str]], *, seconds: float, workers: int = 1
) -> list[bool | None]:
    """Whether each pair of LaTeX answers, the right one first, is equal.

    Args:
        pairs: the right and the given answers, ``(n, 2)``, without a box around them.
        seconds: the longest that one comparison may take.
        workers: how many processes compare.

    Returns:
        ``(n,)``; None where the comparison used up its time, or its process ended.

    Raises:
        RunError: a process does not start.
    """
    count = max(1, min(workers, len(pairs)))
    found: list[bool | None] = [None] * len(pairs)

    stop = threading.Event()

    def compare(first: int) -> None:
        with _Process() as process:
            for i in range(first, len(pairs), count):
                if stop.is_set():
                    return
                found[i] = process.equal(pairs[i], seconds)

    with ThreadPoolExecutor(count) as pool:
        try:
            list(pool.map(compare, range(count)))
        except BaseException:
            stop.set()
            raise
    return found


class _Process:
    """One process with math-verify, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()

    def equal(self, pair: tuple[str, str], seconds: float) -> bool | None:
        process = self._process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(pair).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._kill()
            return None
        answer = _byte(process, seconds)
        if answer in (EQUAL, DIFFERENT):
            return answer == EQUAL
        self._kill()
        return None

    def _started(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            # -P: a file in the working folder must not take the place of a module.
            [sys.executable, "-P", "-m", WORKER],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if _byte(self._process, START) != READY:
            self._kill()
            raise RunError(f"the process that compares answers did not start in {START:.0f} s")
        return self._process

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _byte(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next byte that a process says; empty if it ended or its time is up."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.read(1) if ready else b""
