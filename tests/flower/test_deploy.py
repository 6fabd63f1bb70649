"""The deployment of docs/deploy.md on loopback: TLS, registered nodes, the quickstart's model.

CI runs the tests that are marked ``deployment``, by themselves: their dozen processes need all of a
small machine. Those that kill nodes and servers are slow.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

from fedexlora.exchange.delivery import deliver
from fedexlora.exchange.history import History
from fedexlora.exchange.state import GlobalState, state_tensors
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.recipe import load_recipe
from fedexlora.rounds.run import run
from tests.flower.deployment import ROOT, Deployment, blocked, free_port
from tests.rounds.conftest import files

LET_IN = "SuperNode ID"
"""What a SuperNode says once the SuperLink has accepted it."""
PATIENCE = 30.0
"""Seconds that Flower gives a process to start, and nothing changes that."""


def seconds_to_start() -> float:
    """Of three of Flower's processes at once, as a message to three nodes starts them."""
    command = [str(Path(sys.executable).with_name("flwr-clientapp")), "--help"]
    began = time.monotonic()
    for process in [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]:
        assert process.wait() == 0
    return time.monotonic() - began


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Iterator[Deployment]:
    """It has run to its end."""
    if (needed := seconds_to_start()) > PATIENCE / 2:
        pytest.skip(f"Flower gives its processes {PATIENCE:.0f} s to start; here {needed:.0f} s")
    deployment = Deployment(tmp_path_factory.mktemp("deployed"))
    deployment("keys")
    try:
        deployment("start")
        playing = deployment.begin("run", attempts=3)
        assert playing.wait() == 0, deployment.logs()
        yield deployment
    finally:
        deployment("stop", check=False)


@pytest.mark.deployment
def test_the_adapter_is_that_of_one_process_to_the_bit(deployed, tmp_path):
    deployed.check_equal_to_one_process(tmp_path / "local")


@pytest.mark.deployment
def test_a_node_that_is_not_registered_is_refused(deployed, tmp_path):
    key = tmp_path / "stranger"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", key], check=True
    )
    said = attempt(deployed, "--auth-supernode-private-key", str(key))
    assert LET_IN in (deployed.home / "log" / "node-1.log").read_text()
    assert LET_IN not in said
    assert "Failed to activate SuperNode" in said, said


@pytest.mark.deployment
def test_a_node_that_trusts_another_authority_does_not_connect(deployed, tmp_path):
    other = Deployment(tmp_path)
    other("keys")
    key = deployed.home / "keys" / "node-1"
    said = attempt(
        deployed,
        *("--auth-supernode-private-key", str(key)),
        *("--root-certificates", str(other.home / "keys" / "ca.crt")),
    )
    assert LET_IN not in said
    assert "certificate verify failed" in said.lower(), said


@pytest.mark.deployment
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_behind_the_gate_a_stranger_reaches_no_control_and_a_node_its_messages(deployed, tmp_path):
    key, port = tmp_path / "stranger", free_port()
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", key], check=True
    )
    home = tmp_path / "flwr"
    home.mkdir()
    authority = deployed.home / "keys" / "ca.crt"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "gate"\n[superlink.gate]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{authority}"\n'
    )
    command = [str(Path(sys.executable).with_name("flwr")), "supernode", "register", f"{key}.pub"]
    with gate(deployed, tmp_path, port):
        done = subprocess.run(
            [*command, "gate"],
            env=deployed.environment | {"FLWR_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "403 Forbidden" in done.stdout, done.stdout
        context = ssl.create_default_context(cafile=str(authority))
        with pytest.raises(HTTPError) as refused:
            urlopen(f"https://127.0.0.1:{port}/v1/fleet/pull-messages", data=b"", context=context)
        assert refused.value.code == 415  # the SuperLink's own answer to a message that is none


@contextmanager
def gate(deployed: Deployment, folder: Path, port: int) -> Iterator[None]:
    """The example's nginx in front of the SuperLink."""
    text = (ROOT / "examples" / "deploy" / "nginx.conf").read_text()
    text = text.replace("/srv/fedexlora/keys", str(deployed.home / "keys"))
    text = text.replace("listen 8443", f"listen 127.0.0.1:{port}")
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{deployed.environment['PORT']}")
    paths = "".join(
        f"{name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""  # the test's folder is its user's alone
    site = folder / "nginx.conf"
    site.write_text(
        f"{user} pid {folder}/nginx.pid; daemon off; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {paths}\n{text}}}\n"
    )
    command = ["nginx", "-c", str(site), "-e", str(folder / "error.log")]
    server = subprocess.Popen(command)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (folder / "error.log").read_text()
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()


def attempt(deployed: Deployment, *words: str) -> str:
    """Start a SuperNode that must not get in; what it says until it ends, or is ended."""
    options = {
        "--superlink": f"127.0.0.1:{deployed.environment['PORT']}",
        "--root-certificates": str(deployed.home / "keys" / "ca.crt"),
        "--port": str(free_port()),
        "--max-retries": "1",
    }
    given = [word for pair in options.items() if pair[0] not in words for word in pair]
    command = [str(Path(sys.executable).with_name("flower-supernode")), *given, *words]
    log = deployed.folder / "attempt.log"
    with log.open("w") as out:
        node = subprocess.Popen(command, env=deployed.environment, stdout=out, stderr=out)
        try:
            assert node.wait(60.0) != 0
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
    return log.read_text()


@pytest.mark.slow
def test_a_killed_superlink_is_started_again_and_the_run_goes_on(tmp_path):
    """It ends with the model of an undisturbed run."""
    deployment = Deployment(tmp_path)
    deployment("keys")
    try:
        deployment("start")
        playing = deployment.begin("run")
        deployment.until(lambda: len(deployment.records()) == 1)
        os.kill(deployment.pid("superlink"), signal.SIGKILL)
        playing.wait()
        assert len(deployment.records()) == 1
        deployment("superlink")
        deployment("run")
    finally:
        deployment("stop", check=False)
    deployment.check_equal_to_one_process(tmp_path / "local")


@pytest.mark.slow
def test_nodes_that_sum_in_other_ways_take_no_snapshot_after_their_first(tmp_path):
    """One computes as every processor can, one in two threads: their last bits differ.

    Factors are stacked, which rounds nothing, until they would be larger than the dense matrix; of
    this rank they are by version 3, so that every node has added up its total by itself.
    """
    deployment = Deployment(tmp_path, rounds=4, rank=64)
    settings = {1: {"MKL_CBWR": "COMPATIBLE"}, 2: {"OMP_NUM_THREADS": "2"}, 3: {}}
    deployment("keys")
    try:
        deployment("superlink")
        for number, own in settings.items():
            deployment("node", str(number), settings=own)
        playing = deployment.begin("run", attempts=3)
        assert playing.wait() == 0, deployment.logs()
        for number, own in settings.items():
            environment = deployment.worker(f"node-{number}").environ()
            assert environment.items() >= ({"OMP_NUM_THREADS": "1"} | own).items()
    finally:
        deployment("stop", check=False)
    records = deployment.records()
    assert [len(record["clients"]) for record in records] == [3] * 4
    assert all(record["deviation"] > 0 for record in records[1:])
    assert all(record["certificate"]["held"] for record in records)
    deployment.check_one_snapshot()
    held = [deployment.held(f"node-{number}") for number in settings]
    assert {(state.version, state.id) for state in held} == {(3, held[0].id)}
    assert any(differ(held[0], state) for state in held[1:])
    snapshot = deliver(History(1), held[0], None)
    assert all(c["since"] == 2 for c in records[3]["clients"])
    assert all(c["downloaded_bytes"] < len(snapshot.message) for c in records[3]["clients"])


@pytest.mark.slow
def test_a_server_that_cannot_import_what_trains_ends_with_the_same_model(tmp_path):
    """It has neither model nor rows; nodes score on rows of their own, which are the server's."""
    deployment = Deployment(tmp_path, tables='[evaluation]\nwhere = "clients"\n')
    (tmp_path / "data" / "docstrings" / "validation.jsonl").rename(tmp_path / "own.jsonl")
    shutil.copytree(tmp_path / "data" / "docstrings", tmp_path / "nodes")
    (tmp_path / "own.jsonl").rename(tmp_path / "nodes" / "validation.jsonl")
    deployment("keys")
    try:
        deployment("superlink", settings={"PYTHONPATH": blocked(tmp_path / "blocked")})
        for number in ("1", "2", "3"):
            deployment("node", number)
            path = deployment.home / f"node-{number}.toml"
            text = path.read_text().replace(
                str(tmp_path / "data" / "docstrings"), str(tmp_path / "nodes")
            )
            path.write_text(text.replace("\nshare =", '\nvalidation = "validation"\nshare ='))
        playing = deployment.begin("run", attempts=3)
        assert playing.wait() == 0, deployment.logs()
    finally:
        deployment("stop", check=False)
    recipe = deployment.folder / "app" / "recipe.toml"
    changes = [f'data.source="{tmp_path / "nodes"}"', "evaluation.where=server"]
    result = run(load_recipe(recipe, changes), tmp_path / "local")
    assert files(deployment.home / "run" / "adapter") == files(result.adapter)
    assert files(deployment.home / "run" / "adapter-best") == files(
        tmp_path / "local" / "adapter-best"
    )
    header = json.loads((deployment.home / "run" / "run.json").read_text())
    assert header["packages"]["torch"]
    assert header["arithmetic"] is None
    finish = RunFolder(deployment.home / "run").read_finish()
    found = [*(record["scores"] for record in deployment.records()), finish.scores.model_dump()]
    for version, scores in result.scores().items():
        assert found[version]["pooled"] == pytest.approx(scores, rel=1e-6)
    assert {deployment.held(f"node-{i}").version for i in (1, 2, 3)} == {2}


def differ(one: GlobalState, other: GlobalState) -> bool:
    """Whether two holders of one version hold other bits."""
    ours, theirs = state_tensors(one), state_tensors(other)
    return ours.keys() != theirs.keys() or any(
        not torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "trained"])
def test_a_node_is_killed_and_comes_back_two_rounds_later(tmp_path, moment):
    """Only that client is missed; all nodes end with the same version on their disks.

    One that is killed while it sends may have been heard, once.
    """
    deployment = Deployment(tmp_path, nodes=4, rounds=8, more="deadline = 300")
    node, lost = "node-2", "client-01"
    deployment("keys")
    try:
        deployment("start")
        playing = deployment.begin("run", attempts=3)
        deployment.until(lambda: f"round 2: {moment}" in deployment.worker_log(node))
        deployment.kill_node(node)
        deployment.until(lambda: len(deployment.records()) >= 4)
        deployment("node", "2")
        playing.wait()
    finally:
        deployment("stop", check=False)
    records = deployment.records()
    names = [[c["client"] for c in record["clients"]] for record in records]
    there = [set(found) for found in names]
    assert all(len(set(found)) == len(found) for found in names)
    everyone = {f"client-{i:02d}" for i in range(4)}
    assert len(records) == 8
    assert all(record["certificate"]["held"] for record in records)
    assert there[0] == there[-1] == everyone
    assert all(everyone - found <= {lost} for found in there)
    assert lost not in there[1] or moment == "trained"
    assert lost not in there[2]
    deployment.check_one_snapshot()
    held = [deployment.held(f"node-{i}") for i in range(1, 5)]
    assert held[0].version == 7
    assert len({state.id for state in held}) == 1
