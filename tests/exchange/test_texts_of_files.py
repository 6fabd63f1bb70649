"""Texts of other people's files: what reaches an error is printable, and of bounded length."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexlora.errors import AdapterError, InputError, RunError, UpdateError
from fedexlora.exchange.tensors import TensorFile
from fedexlora.exchange.untrusted import short

FEW = settings(max_examples=30, derandomize=True, deadline=None)
TEXTS = st.text(st.characters(), max_size=40) | st.sampled_from(
    ["\x1b[2J" * 1500, "\u202e", "\x85"]
)


@pytest.mark.parametrize("name", ["a\x1b[31m.weight", "a\nb", "a\u202eb", "a" * 1001, "\x9b2J"])
def test_a_file_whose_names_cannot_be_shown_is_refused(tmp_path, name):
    path = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file({"good.weight": torch.ones(2), name: torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"1 name\(s\) of tensors") as caught:
        TensorFile.open(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_names_in_other_languages_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"größe.層.weight": torch.ones(2)}, path)
    assert list(TensorFile.open(path).tensors) == ["größe.層.weight"]


@FEW
@given(summary=TEXTS, faults=st.lists(TEXTS, max_size=6))
def test_every_error_is_printable_and_bounded(summary, faults):
    for error in (
        InputError(summary, faults),
        AdapterError(summary, faults * 100),
        RunError(summary, faults),
        UpdateError(3, "site-a", [summary, *faults * 100]),
    ):
        assert all(c.isprintable() or c == "\n" for c in str(error))
        assert all(len(text) <= 4000 for text in (error.summary, *error.faults))
        assert len(error.faults) <= 201
    assert len(str(error)) < 3000
    assert str(error).isascii()


@FEW
@given(
    st.recursive(
        TEXTS | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(TEXTS, x)
    )
)
def test_what_is_shown_of_a_value_is_short(value):
    assert len(short(value)) <= 160
    assert short(value).isprintable()
