"""docs/adapters.md: its commands and its Python are run, in order, in one folder."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from tests.cli.invoke import fedexlora
from tests.test_docs import ROOT, commands

PAGE = ROOT / "docs" / "adapters.md"


def test_the_commands_and_the_python_of_the_page_run(whole, bert, tmp_path, monkeypatch):
    """The adapters are what the clients of a real run sent."""
    monkeypatch.chdir(tmp_path)
    sent = sorted((whole / "updates" / "round-0003").iterdir())
    for i, folder in enumerate(sent, 1):
        shutil.copytree(folder, f"site-{i}")
    Path("base").symlink_to(bert)
    Path("runs").mkdir()
    Path("runs/demo").symlink_to(whole)
    for command in commands(PAGE):
        program, *words = shlex.split(command)
        assert program == "fedexlora"
        done = fedexlora(*words)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert Path("deviation.png").stat().st_size > 10_000
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[-1]
    exec(compile(code, "docs/adapters.md", "exec"), {})
    assert Path("merged-py/config.json").exists()
