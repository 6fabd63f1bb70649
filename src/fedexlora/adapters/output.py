"""The folder that a result is written to: whole, or not there at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedexlora.errors import AdapterError
from fedexlora.exchange.files import new_folder


def check_new(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        AdapterError: if ``out`` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"--out {out} already exists", ["choose another folder"])


@contextmanager
def output(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` once the block ends without an error.

    Raises:
        AdapterError: if ``out`` holds something or cannot be written, as on a full disk, or if a
            file that the block reads cannot be.
    """
    check_new(out)
    written = out.parent
    try:
        with new_folder(out) as written:
            yield written
    except OSError as error:
        reason = error.strerror or error
        if error.filename and written not in Path(error.filename).parents:
            raise AdapterError(f"{error.filename} cannot be read: {reason}") from error
        raise AdapterError(f"--out {out} cannot be written: {reason}") from error
