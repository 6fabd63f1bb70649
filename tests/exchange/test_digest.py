"""The digest of a group of tensors: what changes it, and what does not."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.digest import (
    branch_of,
    climb,
    group,
    tensor_digest,
    tensors_digest,
    text_digest,
)
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec, TensorSpec
from fedexlora.exchange.step import Step, StepDigests
from fedexlora.exchange.step_writer import StepBuilder
from fedexlora.exchange.version import first_id, next_id

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROPERTY = settings(max_examples=60, derandomize=True, deadline=None, database=None)
NAMES = st.text(min_size=1, max_size=6)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def random(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def groups(draw) -> dict[str, torch.Tensor]:
    names = draw(st.lists(NAMES, min_size=1, max_size=7, unique=True))
    return {
        name: random(draw(SHAPES), draw(st.sampled_from(DTYPES)), i) for i, name in enumerate(names)
    }


@PROPERTY
@given(tensors=groups(), data=st.data())
def test_the_order_and_the_layout_of_tensors_change_nothing(tensors, data):
    order = data.draw(st.permutations(list(tensors)))
    other = {name: tensors[name].clone() for name in order}
    for name, tensor in other.items():
        if tensor.ndim == 2:
            other[name] = tensor.T.contiguous().T
    assert tensors_digest(other) == tensors_digest(tensors)


@PROPERTY
@given(tensors=groups(), data=st.data())
def test_any_byte_name_dtype_or_shape_changes_the_digest(tensors, data):
    before = tensors_digest(tensors)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    rest = {n: t for n, t in tensors.items() if n != name}
    changed = [rest, rest | {data.draw(NAMES.filter(lambda n: n not in tensors)): tensor}]
    changed.append(tensors | {name: tensor[None]})
    changed += [tensors | {name: tensor.view(d)} for d in DTYPES if _same_size(d, tensor)]
    changed.append(tensors | {name + "x": torch.zeros(0)})
    if tensor.numel():
        plain = tensor.clone().reshape(-1).view(torch.uint8)
        plain[data.draw(st.integers(0, len(plain) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        changed.append(tensors | {name: plain.view(tensor.dtype).reshape(tensor.shape)})
    digests = [tensors_digest(found) for found in changed]
    assert before not in digests
    assert len(set(digests)) == len(digests)


def _same_size(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    return dtype != tensor.dtype and dtype.itemsize == tensor.dtype.itemsize


@PROPERTY
@given(tensors=groups(), data=st.data())
def test_exchanging_two_tensors_changes_the_digest(tensors, data):
    assume(len(tensors) > 1)
    one, two = data.draw(st.permutations(sorted(tensors)))[:2]
    a, b = tensors[one], tensors[two]
    assume(tensor_digest("", a) != tensor_digest("", b))
    assert tensors_digest(tensors | {one: b, two: a}) != tensors_digest(tensors)


@PROPERTY
@given(names=st.lists(NAMES, min_size=1, max_size=40, unique=True), data=st.data())
def test_a_member_and_its_branch_lead_to_the_group_and_no_other_member_does(names, data):
    members = {name: text_digest(name) for name in names}
    name = data.draw(st.sampled_from(names))
    branch, whole = branch_of(members, name), group(members)
    assert climb(name, members[name], branch) == whole
    assert len(branch) <= (len(names) - 1).bit_length()
    assert climb(name, text_digest(name + "x"), branch) != whole
    assert climb(name + "x", members[name], branch) != whole
    if branch:
        turned = [("<" if beside[0] == ">" else ">") + beside[1:] for beside in branch]
        assert climb(name, members[name], turned) != whole
        assert climb(name, members[name], branch[:-1]) != whole


@pytest.mark.parametrize("branch", [[3], [""], ["0" * 64], ["<" + "g" * 64], ["<abc"], [None]])
def test_what_is_no_branch_is_refused(branch):
    with pytest.raises(ValueError, match="expected a digest"):
        climb("a", text_digest("a"), branch)


def test_an_empty_group_is_none_of_its_members_own():
    assert group({}) not in {
        group({"": group({})}),
        text_digest(""),
        tensors_digest({"": torch.tensor([])}),
    }


SPEC = AdapterSpec(
    {"m": ModuleSpec(7, 5, 2, torch.float32, 2.0)},
    {"head": TensorSpec((3, 4), torch.float32)},
    ("A", "B"),
)
ADAPTER = {"m": Factors(torch.ones(2, 5), torch.ones(7, 2))}
HEADS = {"head": torch.ones(3, 4)}
OWN = {"c": {"m": Factors(torch.ones(3, 5), torch.ones(7, 3))}}


def test_version_0_is_its_spec_base_adapter_heads_and_own_adapters():
    given = {"specs": {"": SPEC}, "base": "b", "adapter": ADAPTER, "dense": HEADS, "own": OWN}
    other = AdapterSpec({"m": ModuleSpec(7, 5, 2, torch.float32, 2.5)}, SPEC.dense, SPEC.trained)
    changes = [
        {"specs": {"": other}},
        {"specs": {"": SPEC, "c": SPEC}},
        {"specs": {"": AdapterSpec(SPEC.modules, SPEC.dense, ("B",))}},
        {"base": "c"},
        {"adapter": {"m": Factors(torch.zeros(2, 5), torch.ones(7, 2))}},
        {"dense": {"head": torch.zeros(3, 4)}},
        {"own": {}},
    ]
    ids = [first_id(**given | change) for change in ({}, *changes)]
    assert len(set(ids)) == len(ids)
    assert first_id(**given) == ids[0]


def made(**changes: object) -> Step:
    given = {
        "previous": "a" * 64,
        "adapter": ADAPTER,
        "trained": ("A", "B"),
        "dense": HEADS,
        "pieces": {"m": LowRank(Factors(torch.ones(1, 5), torch.ones(7, 1)))},
        "own_digests": {},
    } | changes
    sink = StepBuilder(3, given["previous"], given["trained"])
    for name, pair in given["adapter"].items():
        sink.add(name, pair, given["pieces"].get(name, LowRank.zeros(7, 5, torch.float32)))
    return sink.finish(given["dense"], {}, given["own_digests"], {})


def test_the_id_of_a_version_is_the_hash_of_the_last_and_of_its_step():
    step = made()
    raw = bytes.fromhex(step.previous) + bytes.fromhex(step.digests.whole)
    assert step.id == hashlib.sha256(raw).hexdigest() == next_id(step.previous, step.digests.whole)


def test_every_part_of_a_step_changes_its_id_and_a_zero_piece_is_none():
    zero = LowRank.zeros(7, 5, torch.float32)
    changes = [
        {"previous": "b" * 64},
        {"adapter": {"m": Factors(torch.zeros(2, 5), torch.ones(7, 2))}},
        {"trained": ("B",)},
        {"dense": {"head": torch.zeros(3, 4)}},
        {"pieces": {"m": zero}},
        {"pieces": {"m": LowRank(torch.ones(7, 5))}},
        {"own_digests": {"c": "c" * 64}},
    ]
    ids = [made(**change).id for change in ({}, *changes)]
    assert len(set(ids)) == len(ids)
    assert made(pieces={}).id == made(pieces={"m": zero}).id
    parts = [made(**change).digests.to_json() for change in ({}, *changes)]
    assert sum(one != other for one, other in zip(parts[0], parts[-1], strict=True)) == 1
    assert StepDigests.from_json(parts[0]) == made().digests


def test_a_piece_is_rounded_to_float32_once():
    piece = LowRank(Factors(torch.randn(1, 5), torch.randn(7, 1)).to(torch.float64)).scaled(1 / 3)
    rounded = made(pieces={"m": piece}).pieces["m"]
    assert rounded.value.dtype == torch.float32
    assert torch.equal(rounded.value.B, piece.value.B.float())
