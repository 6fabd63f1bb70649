"""One run has one id, however often it is resumed."""

from __future__ import annotations

import pytest

from fedexlora.errors import RunError
from fedexlora.flower.run_id import FILE, run_id


def test_a_run_has_one_id_and_another_run_another(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    found = run_id(tmp_path / "one")
    assert run_id(tmp_path / "one") == found
    assert run_id(tmp_path / "other") != found


def test_an_id_that_is_damaged_or_cannot_be_written_is_named(tmp_path):
    (tmp_path / FILE).write_text("none")
    with pytest.raises(RunError, match="run-id is damaged: expected a digest") as caught:
        run_id(tmp_path)
    assert "remove it" in caught.value.faults[0]
    with pytest.raises(RunError, match="run-id: No such file"):
        run_id(tmp_path / "gone")
