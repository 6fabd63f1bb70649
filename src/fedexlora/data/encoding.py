"""The content of a file: decompressed by its suffix, and as text by its byte order mark."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from pathlib import Path

import pyarrow as pa

from fedexlora.errors import DataError

COMPRESSIONS = ("gz", "bz2", "xz", "zst")
"""Suffixes of compressed files."""

# The mark of UTF-16 begins that of UTF-32.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_content(path: Path, compression: str | None) -> bytes:
    """A file's bytes.

    Args:
        path: the file.
        compression: one of ``COMPRESSIONS``, or None for a file that is not compressed.

    Raises:
        DataError: if it cannot be read, or is damaged.
    """
    try:
        match compression:
            case None:
                return path.read_bytes()
            case "gz":
                return gzip.decompress(path.read_bytes())
            case "bz2":
                return bz2.decompress(path.read_bytes())
            case "xz":
                return lzma.decompress(path.read_bytes())
        with pa.input_stream(str(path), compression="zstd") as stream:
            content: bytes = stream.read()
            return content
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        what = "cannot be read" if compression is None else f"is no whole .{compression} file"
        raise DataError(f"{path}: {what}: {error}") from error


def read_text(path: Path, compression: str | None) -> str:
    """A file's text without its byte order mark; UTF-8 where it has none.

    Raises:
        DataError: naming the line, if it is no text.
    """
    content = read_content(path, compression)
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise DataError(f"{path}: line {line}: expected UTF-8, found {error}") from error
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise DataError(
            f"{path}: line {line}: expected UTF-8, found a zero byte; "
            "UTF-16 is read if the file begins with its byte order mark"
        )
    return text
