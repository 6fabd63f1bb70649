"""The process in which math-verify compares answers; see ``equivalence.py``.

It says ``READY``, then for each line, a JSON list of the right and the given answer, one byte. It
imports nothing of fedexlora but this file and keeps no time: its parent ends it.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys

MEMORY = (
    4 * 2**30
)  # bytes; a power of powers ends in an error here, not in a machine without memory
READY, EQUAL, DIFFERENT = b"r", b"1", b"0"


def main() -> None:
    """Answer until standard input ends."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    def equal(pair: list[str]) -> bool:
        gold, given = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in pair)
        return bool(verify(gold, given, timeout_seconds=None))

    equal(
        [r"\frac{1}{2}", "0.5"]
    )  # loads what is loaded late, so that no answer's time pays for it
    answers = sys.stdout.fileno()
    os.write(answers, READY)
    for line in sys.stdin:
        os.write(answers, EQUAL if equal(json.loads(line)) else DIFFERENT)


if __name__ == "__main__":
    main()
