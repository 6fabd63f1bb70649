"""Messages that are damaged, lie about themselves, or hold what no model is made of."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping

import safetensors.torch
import torch
from torch import Tensor

from fedexlora.exchange.wire import digest, pack, unpack

LENGTHS = (0, 1, 7, 2**31, 2**32, 100_000_001, 2**63 - 1, 2**63, 2**64 - 1)
DTYPES = ("F64", "F16", "BF16", "I64", "I32", "U16", "U8", "BOOL", "C64", "F8_E4M3")
DTYPES += ("F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "f32", "float32", "", "X", "F32\0")
SHAPES = ([], [0], [1], [2**62, 0], [2**63, 0], [2**64 - 1, 0], [0, 2**32, 2**32])
SHAPES += ([2**40], [2**62, 4], [2**64], [10**30], [-1], [1.0], [True], [None], ["2"], [[2]])
SHAPES += ([1] * 70, [0] * 5000, None, "2", {}, 3)
OFFSETS = ([0, 0], [1, 0], [-1, 4], [0, 2**63], [2**63, 2**63 + 8], [0, 2**64], [0.0, 4.0])
OFFSETS += ([0], [0, 4, 8], [None, None], ["0", "4"], None, {}, [4, 12])
NAN, INFINITY = float("nan"), float("inf")
VALUES = (None, True, False, -1, -(2**70), 2**53 + 1, 10**400, NAN, INFINITY, -INFINITY)
VALUES += ("3", "", "a\0b", "\ud800", "x" * 100_000, [], [3], [[]], [None] * 1000, {"a": {}})
RAW = ("1e400", "-1e400", "[" * 900 + "]" * 900, "[" * 100_000, '{"a":' * 100_000, "9" * 5000)
TEXTS = (
    "",
    " ",
    "null",
    "3",
    "[]",
    '"a"',
    "{",
    "{}",
    "{'a': 1}",
    '{"a": 1}}',
    "\ufeff{}",
    "\ud800",
)
JUNK = (b"", b"\0", b"{}", b"\0" * 7, b"\xff" * 8, b"\0" * 64, b"PK\x03\x04" + b"\0" * 60)

Cases = Iterator[tuple[str, bytes]]


def frame(header: object, body: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text + body


def parts(message: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(message[:8], "little")
    return json.loads(message[8 : 8 + size]), message[8 + size :]


def stored(header: Mapping) -> bool:
    """Whether it is that of a stored file: its checksum is that of the text alone."""
    said = header["__metadata__"]
    return said["sha256"] == hashlib.sha256(said["fedexlora"].encode()).hexdigest()


def unpacked(message: bytes) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the JSON object of a message, or of a stored file."""
    header, _ = parts(message)
    if not stored(header):
        return unpack(message)
    return safetensors.torch.load(message), json.loads(header["__metadata__"]["fedexlora"])


def packed(tensors: Mapping[str, Tensor], said: Mapping, like: bytes) -> bytes:
    """Tensors and a JSON object in a message, or in a stored file, as ``like`` is one."""
    if not stored(parts(like)[0]):
        return pack(tensors, said)
    text = json.dumps(said, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return bytes(safetensors.torch.save(ready, {"fedexlora": text, "sha256": checksum}))


def signed(header: Mapping, body: bytes, text: str | None = None) -> bytes:
    """A file with the checksum that its content has, or an old one where it cannot be read."""
    whole = stored(header)
    text = header["__metadata__"]["fedexlora"] if text is None else text
    said = header["__metadata__"] | {"fedexlora": text}
    try:
        tensors = safetensors.torch.load(frame({**header, "__metadata__": said}, body))
        plain = hashlib.sha256(text.encode()).hexdigest()
        said["sha256"] = plain if whole else digest(tensors, text)
    except Exception:  # noqa: BLE001 - whatever a reader makes of it
        said["sha256"] = "0" * 64
    return frame({**header, "__metadata__": said}, body)


def damaged(message: bytes, others: Mapping[str, bytes]) -> Cases:
    """Bits, bytes and lengths that changed on the way; the checksum is that of before."""
    header, body = parts(message)
    start = len(message) - len(body)
    step = max(1, len(message) // 60)
    for i in sorted({*range(8), *range(8, len(message), step), len(message) - 1}):
        yield f"bit {i}", message[:i] + bytes([message[i] ^ (1 << i % 8)]) + message[i + 1 :]
    for i in range(0, len(message), 3 * step):
        yield f"insert {i}", message[:i] + bytes([i % 256]) + message[i:]
        yield f"delete {i}", message[:i] + message[i + 1 :]
    ends = {offset for e in header.values() if "shape" in e for offset in e["data_offsets"]}
    for cut in sorted({*range(17), start // 2, start, *(start + end for end in ends)}):
        for at in {max(0, cut - 1), cut, cut + 1} & set(range(len(message))):
            yield f"cut {at}", message[:at]
    for more in JUNK[1:]:
        yield f"append {more!r}", message + more
        yield f"prepend {more!r}", more + message
    for length in (*LENGTHS, start - 9, start - 7, len(message) - 8, len(message)):
        yield f"length {length}", struct.pack("<Q", length) + message[8:]
    for name, other in others.items():
        theirs, their_body = parts(other)
        if other != message:
            yield f"header of {name}", frame(theirs, body)
            yield f"body of {name}", frame(header, their_body)
            yield (
                f"metadata of {name}",
                frame(header | {"__metadata__": theirs["__metadata__"]}, body),
            )
    for junk in JUNK:
        yield f"junk {junk!r}", junk


def lying(message: bytes) -> Cases:
    """Headers that say something else than what follows, signed where that can be."""
    header, body = parts(message)
    name, entry = next((n, e) for n, e in header.items() if "shape" in e)
    for key, values in (("dtype", DTYPES), ("shape", SHAPES), ("data_offsets", OFFSETS)):
        for value in values:
            changed = header | {name: entry | {key: value}}
            yield f"{key} {str(value)[:40]}", signed(changed, body)
            if key == "shape":
                empty = {"y": {"dtype": "F32", "shape": value, "data_offsets": [0, 0]}}
                yield f"unexpected empty {str(value)[:40]}", signed(header | empty, body)
    for key in entry:
        lacks = {k: v for k, v in entry.items() if k != key}
        yield f"no {key}", signed(header | {name: lacks}, body)
    yield (
        "all overlap",
        signed(
            {
                n: e | {"data_offsets": entry["data_offsets"]} if "shape" in e else e
                for n, e in header.items()
            },
            body,
        ),
    )
    text = json.dumps(header)
    raw = {
        "name twice": text[:-1] + f', "{name}": {json.dumps(entry | {"shape": [1]})}}}',
        "metadata twice": text[:-1] + f', "__metadata__": {json.dumps(header["__metadata__"])}}}',
        "checksum twice": text.replace('"sha256"', '"sha256": "0", "sha256"', 1),
        "no metadata": json.dumps({n: e for n, e in header.items() if "shape" in e}),
        "deep": '{"a":' * 500 + text + "}" * 500,
        "list": f"[{text}]",
        "nothing": "",
    }
    for value in (None, 3, [], "a", {}, {"fedexlora": None}, {"fedexlora": 3}, {"sha256": "0"}):
        raw[f"metadata {value}"] = json.dumps(header | {"__metadata__": value})
    for case, changed in raw.items():
        yield case, frame(changed.encode(), body)
    yield "not UTF-8", frame(text.encode().replace(b'"shape"', b'"sh\xffpe"', 1), body)
    yield "a lone surrogate", frame(text.replace(name, "\\ud800", 1).encode(), body)
    yield "UTF-16", frame(text.encode("utf-16"), body)


def forged_headers(message: bytes) -> Cases:
    """Signed messages whose own header is not what it must be."""
    header, body = parts(message)
    own = unpacked(message)[1]
    for text in TEXTS:
        yield f"header {text!r}", signed(header, body, text)
    for key in own:
        texts = [*(json.dumps(v) for v in VALUES if v != own[key] or type(v) is bool), *RAW]
        for value in texts:
            text = json.dumps(own | {key: "\0here"}).replace('"\\u0000here"', value)
            yield f"{key} = {value[:40]}", signed(header, body, text)
        yield (
            f"no {key}",
            signed(header, body, json.dumps({k: v for k, v in own.items() if k != key})),
        )


def forged_tensors(message: bytes) -> Cases:
    """Signed messages whose tensors are not those that they must be."""
    tensors, header = unpacked(message)
    yield "no tensors", packed({}, header, message)
    for extra in (
        "A/other",
        "B/other",
        "dense/other",
        "x",
        "",
        "total/x",
        "piece1/x",
        "piece9.A/x",
    ):
        yield f"unexpected {extra!r}", packed(tensors | {extra: torch.ones(2, 3)}, header, message)
    for name, tensor in tensors.items():
        lacks = {n: t for n, t in tensors.items() if n != name}
        yield f"{name} missing", packed(lacks, header, message)
        yield (
            f"{name} renamed",
            packed({n + "\0" * (n == name): t for n, t in tensors.items()}, header, message),
        )
        for kind, changed in _spoiled(tensor).items():
            yield f"{name} {kind}", packed(tensors | {name: changed}, header, message)


def _spoiled(tensor: Tensor) -> dict[str, Tensor]:
    found = {f"as {dtype}": tensor.to(dtype) for dtype in (torch.int64, torch.bool, torch.int8)}
    found |= {"as float8": tensor.to(torch.float8_e5m2), "complex": tensor.to(torch.complex64)}
    found |= {"half": tensor.half(), "bfloat16": tensor.bfloat16()}
    found |= {"flat": tensor.reshape(-1), "scalar": tensor.reshape(-1)[0], "cube": tensor[None]}
    found |= {"of no rows": tensor[:0], "of no columns": tensor[:, :0]}
    found |= {"of more rows": torch.cat([tensor, tensor[:1]]), "transposed": tensor.T[:, :1]}
    for value in (NAN, INFINITY, -INFINITY):
        spoiled = tensor.clone()
        spoiled.reshape(-1)[-1] = value
        found[f"with {value}"] = spoiled
    return found
