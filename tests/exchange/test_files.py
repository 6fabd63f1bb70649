"""Files are whole or absent."""

from __future__ import annotations

import pytest

from fedexlora.exchange.files import new_folder, replace_bytes


def test_a_file_is_replaced_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    replace_bytes(path, b"old")
    replace_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    def interrupted() -> None:
        with new_folder(tmp_path / "adapter") as path:
            (path / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "adapter") as path:
        (path / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    with new_folder(tmp_path / "adapter") as path:
        (path / "newer").write_text("x")
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["newer"]
