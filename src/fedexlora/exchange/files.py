"""Files that are whole or absent, or grow line by line, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedexlora.errors import RunError


def replace_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replace a file in one step: readers see the old or the new content, even after a crash.

    Args:
        path: the file.
        content: the new content.
        sync: force it to the disk. Without, it survives the process that wrote it; a power failure
            may leave it empty or cut off, and its reader has to find out.

    Raises:
        OSError: if it cannot be written, as on a full disk; nothing is left beside it.
    """
    temporary = beside(path)
    try:
        _write(temporary, content, sync=sync)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def beside(path: Path) -> Path:
    """Where a file is written before it takes the place of ``path``."""
    return path.with_name(f".{path.name}.tmp")


def rename(finished: Path, path: Path) -> None:
    """Let a finished file, which is forced to the disk already, take the place of ``path``.

    Raises:
        OSError: if it cannot.
    """
    finished.replace(path)
    sync_folder(path.parent)


def append_bytes(path: Path, content: bytes) -> None:
    """Add to a file and force it to the disk; after a crash its end may be cut off.

    Raises:
        OSError: if it cannot be written, as on a full disk; the file is as it was then.
    """
    before = path.stat().st_size if path.exists() else None
    try:
        _append(path, content)
    except OSError:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            os.truncate(path, before)
        raise
    if before is None:
        sync_folder(path.parent)


def cut_off(path: Path, size: int) -> None:
    """Leave the first bytes of a file, and force it to the disk; a file that is absent is made.

    Raises:
        OSError: if it cannot be written.
    """
    if not path.exists():
        append_bytes(path, b"")
    elif path.stat().st_size > size:
        os.truncate(path, size)
        _sync(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` once the block ends without an error."""
    temporary = beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder that cannot be written, as on a full disk.

    Raises:
        RunError: if the block fails for that reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{path} cannot be written: {reason}",
            ["--resume goes on after the last finished round"],
        ) from error


def _write(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file and force it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _append(path: Path, content: bytes) -> None:
    """Add to a file and force it to the disk."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk; a rename is not durable before that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
