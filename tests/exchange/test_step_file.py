"""A step made module by module is the same in memory and in a file, of which nothing is held."""

from __future__ import annotations

import errno
import gc
import json
import tracemalloc

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import DigestError, RunError
from fedexlora.exchange import tensors as tensors_module
from fedexlora.exchange.digest import group
from fedexlora.exchange.step import encode_steps
from fedexlora.exchange.step_file import open_step, read_step
from fedexlora.exchange.step_writer import StepBuilder, StepWriter
from fedexlora.exchange.tensors import TensorFile, TensorWriter
from fedexlora.exchange.version import adapter_digest
from tests.exchange.hostile import frame, packed, parts, unpacked

PREVIOUS = "a" * 64
SHAPES = {"q": (7, 5), "v": (11, 3), "up": (4, 9), "down": (9, 4)}
HELD = {"a": 2, "b": None, "c": 0}


def drawn(seed: int, dtype: torch.dtype = torch.float32):
    """By module: an adapter, and a piece that is factored, dense, zero or not laid out in rows."""
    torch.manual_seed(seed)
    made = {}
    for i, (name, (rows, columns)) in enumerate(SHAPES.items()):
        pair = Factors(torch.randn(2, columns).to(dtype), torch.randn(rows, 2).to(dtype))
        pieces = (
            LowRank(Factors(torch.randn(3, columns), torch.randn(rows, 3)).to(torch.float64)),
            LowRank(torch.randn(rows, columns, dtype=torch.float64)),
            LowRank.zeros(rows, columns, torch.float64),
            LowRank(Factors(torch.randn(columns, 3).T, torch.randn(3, rows).T)),
        )
        made[name] = pair, pieces[i]
    return made


def filled(sink, made, *, heads: bool = True, own: bool = True):
    for name, (pair, piece) in made.items():
        sink.add(name, pair, piece)
    dense = {"head.weight": torch.arange(12.0).reshape(3, 4), "head.bias": torch.ones(3)}
    adapters = {c: {n: pair.padded(4) for n, (pair, _) in made.items()} for c in ("b", "c")}
    digests = {client: adapter_digest(found) for client, found in adapters.items()}
    digests["other"] = "c" * 64
    changed = {"b": adapters["b"]} if own else {}
    return sink.finish(dense if heads else {}, changed, digests if own else {}, HELD)


def written(path, made, trained=("A", "B"), **parts):
    sink = StepWriter(
        path, 3, PREVIOUS, trained, made, ("head.weight", "head.bias"), {"b": "b", "c": "c"}, HELD
    )
    return filled(sink, made, **parts)


@pytest.mark.parametrize("trained", [("A", "B"), ("B",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
def test_both_sinks_make_the_same_step(tmp_path, trained, dtype, whole):
    made, path, parts = drawn(1, dtype), tmp_path / "step", {"heads": whole, "own": whole}
    built = filled(StepBuilder(3, PREVIOUS, trained), made, **parts)
    found = written(path, made, trained, **parts)
    assert found.id == built.id
    assert found.digests == built.digests
    for step in (found, read_step(path).step):
        mine, theirs = encode_steps([step]), encode_steps([built])
        assert mine[1] == theirs[1]
        assert mine[0].keys() == theirs[0].keys()
        assert all(torch.equal(tensor, theirs[0][name]) for name, tensor in mine[0].items())
        assert step.pieces.keys() == {"q", "v", "down"}, "a zero piece is none"
        assert {c: adapter_digest(x) for c, x in step.own.items()} == {
            c: adapter_digest(x) for c, x in built.own.items()
        }
    assert read_step(path).held == HELD
    assert json.loads(TensorFile.open(path).metadata["fedexlora"]) == {
        "version": 3,
        "id": built.id,
        "previous": PREVIOUS,
        "digests": built.digests.to_json(),
        "held": HELD,
        "shared": {},
        "memory": group({}),
    }


def test_what_the_server_remembers_is_in_the_file_and_no_part_of_the_step(tmp_path):
    made, path = drawn(1), tmp_path / "step"
    ids = []
    for remembers in (False, True):
        sink = StepWriter(path, 3, PREVIOUS, ("A", "B"), made, remembers=remembers)
        for name, (pair, piece) in made.items():
            sink.add(name, pair, piece, {"A": pair.A, "B": pair.B} if remembers else {})
        ids.append(sink.finish({}, {}, {}, {}).id)
    assert ids[0] == ids[1]
    stored = read_step(path)
    assert stored.memory.keys() == made.keys()
    assert torch.equal(stored.memory["v"]["B"], made["v"][0].B)
    assert not [name for name in encode_steps([stored.step])[0] if "memory" in name]
    tensors, said = unpacked(path.read_bytes())
    tensors["memory.A/q"] = tensors["memory.A/q"] + 1.0
    path.write_bytes(packed(tensors, said, path.read_bytes()))
    with pytest.raises(DigestError, match="memory of step 3 is damaged"):
        read_step(path)


def test_the_order_of_modules_does_not_change_the_id(tmp_path):
    made = drawn(2)
    turned = dict(reversed(made.items()))
    assert written(tmp_path / "x", made).id == written(tmp_path / "y", turned).id


def test_a_step_of_a_file_holds_none_of_it_and_reading_holds_one_tensor(tmp_path):
    torch.manual_seed(0)
    count, size = 24, 128 * 96
    piece = LowRank(torch.randn(128, 96))
    made = {
        f"m{i}": (Factors(torch.randn(2, 96), torch.randn(128, 2)), piece) for i in range(count)
    }
    step = written(tmp_path / "step", made, heads=False, own=False)
    del made, piece
    gc.collect()
    before = live()
    assert sum(x.value.numel() for x in step.pieces.values()) == count * size
    read_step(tmp_path / "step")
    assert live() == before
    tracemalloc.start()
    read_step(tmp_path / "step")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 100_000, "names and digests"


def live() -> int:
    """Numbers in tensors that are held anywhere."""
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor)


def spoilt(path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("A/v", "adapter"),
        ("dense/head.bias", "heads"),
        ("piece/v", "remainder"),
        ("piece.B/q", "remainder"),
    ],
)
def test_one_changed_bit_is_found_and_its_part_is_named(tmp_path, name, part):
    path = tmp_path / "step"
    written(path, drawn(3))
    header, body = parts(path.read_bytes())
    spoilt(path, len(path.read_bytes()) - len(body) + header[name]["data_offsets"][0])
    with pytest.raises(DigestError, match=rf"(?s)step 3 .*{part}: expected"):
        read_step(path)
    open_step(path)  # for receivers, that hold its parts against the digests themselves


def test_what_is_no_step_is_refused(tmp_path):
    path = tmp_path / "step"
    written(path, drawn(4))
    whole = path.read_bytes()
    header, body = parts(whole)
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_step(path)
    text = header["__metadata__"]["fedexlora"]
    said = header["__metadata__"] | {"fedexlora": text.replace('"a": 2', '"a": 1')}
    path.write_bytes(frame(header | {"__metadata__": said}, body))
    with pytest.raises(ValueError, match="does not have the checksum"):
        open_step(path)
    renamed = {("x" + n if n == "A/q" else n): entry for n, entry in header.items()}
    path.write_bytes(frame(renamed, body))
    with pytest.raises(ValueError, match="unexpected tensors"):
        open_step(path)


def test_numbers_of_which_no_model_can_be_made_are_refused(tmp_path):
    made = drawn(5)
    made["v"][0].B[0, 0] = float("nan")
    written(tmp_path / "step", made)
    with pytest.raises(ValueError, match="B/v: .*expected finite"):
        read_step(tmp_path / "step")


def full(self, name, spec, rows):
    if name == "piece/v":
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(self, name, spec, rows)


real = TensorWriter.add_pieces


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module.TensorWriter, "add_pieces", full)
    with pytest.raises(RunError, match="step cannot be written: No space left"):
        written(tmp_path / "step", drawn(6))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="cannot be written: No such file"):
        written(tmp_path / "nowhere" / "step", drawn(6))


def test_a_step_that_is_not_finished_leaves_nothing(tmp_path):
    sink = StepWriter(tmp_path / "step", 3, PREVIOUS, ("A", "B"), SHAPES)
    sink.add("q", *drawn(7)["q"])
    sink.close()
    assert not list(tmp_path.iterdir())
    step = written(tmp_path / "step", drawn(7))
    assert read_step(tmp_path / "step").step.id == step.id


def test_an_adapter_that_many_clients_share_is_written_and_read_once(tmp_path):
    made = drawn(9)
    one, other = ({n: pair.padded(rank) for n, (pair, _) in made.items()} for rank in (3, 4))
    own = {f"client-{i:03d}": other if i == 7 else one for i in range(300)}
    first = {client: "client-007" if client == "client-007" else "client-000" for client in own}
    digests = {client: adapter_digest(found) for client, found in own.items()}
    ids = set()
    for sink in (
        StepBuilder(3, PREVIOUS, ("A", "B")),
        StepWriter(tmp_path / "step", 3, PREVIOUS, ("A", "B"), SHAPES, (), first),
    ):
        for name, pair in made.items():
            sink.add(name, *pair)
        step = sink.finish({}, own, digests, {})
        assert step.own.keys() == {"client-000", "client-007"}
        assert step.shared == {c: name for c, name in first.items() if c != name}
        ids.add(step.id)
    assert len(ids) == 1
    names = [name for name in TensorFile.open(tmp_path / "step").tensors if "own." in name]
    assert len(names) == 2 * 2 * len(SHAPES)
    whole = (tmp_path / "step").read_bytes()
    for shared in ({"client-000": "client-007"}, {"x": "y"}, {"x": 3}, [], None):
        tensors, said = unpacked(whole)
        (tmp_path / "step").write_bytes(packed(tensors, said | {"shared": shared}, whole))
        with pytest.raises(ValueError, match="header 'shared'"):
            open_step(tmp_path / "step")


def test_many_holders_fit_the_header(tmp_path):
    clients = {f"client-{'x' * (i % 50)}{i}": i % 3 or None for i in range(500)}
    sink = StepWriter(tmp_path / "step", 2**40, PREVIOUS, ("B",), SHAPES, (), {}, clients)
    for name, pair in drawn(8).items():
        sink.add(name, *pair)
    sink.finish({}, {}, {}, clients)
    assert read_step(tmp_path / "step").held == clients
