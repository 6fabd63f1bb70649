"""What tells one run from another of the same recipe: nodes answer each for itself."""

from __future__ import annotations

import secrets
from pathlib import Path

from fedexlora.errors import RunError
from fedexlora.exchange.digest import known_digest
from fedexlora.exchange.files import replace_bytes

FILE = "run-id"
"""In the run's folder, from its start on, however often it is resumed."""


def run_id(folder: Path) -> str:
    """The id of the run in a folder; made up where it has none yet.

    Args:
        folder: the run's.

    Raises:
        RunError: if the file holds something else, or cannot be read or written.
    """
    path = folder / FILE
    try:
        if not path.exists():
            replace_bytes(path, f"{secrets.token_hex(32)}\n".encode())
        return known_digest(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        said = "remove it: nodes then train again what they had finished for this run"
        raise RunError(f"{path} is damaged: {error}", [said]) from error
