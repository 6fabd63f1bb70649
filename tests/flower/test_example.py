"""The example app under Flower's own ``flwr run``, in a SuperLink that the test starts and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

pytest.importorskip("flwr")
pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROUNDS = 2


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def superlink(environment, port, control):
    """A SuperLink on the loopback that simulates nodes; it and its children are ended after."""
    command = [BIN / "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", port]
    command += ["--control-api-address", f"127.0.0.1:{control}"]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(240):
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (URLError, OSError):
                assert process.poll() is None, "the SuperLink ended"
                time.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def model_folder(bert, tmp_path):
    """A classifier whose file has all weights, so that every process loads the same base."""
    folder = tmp_path / "model"
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(bert, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_example_runs_in_flowers_simulation(model_folder, tmp_path):
    port, control = free_ports(2)
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    adapter = tmp_path / "adapter"
    config = f"model-name='{model_folder}' save-path='{adapter}' num-server-rounds={ROUNDS}"
    command = [BIN / "flwr", "run", ROOT / "examples" / "flower_strategy", "--stream", "-c", config]
    with superlink(environment, port, control):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert log.count("2 of 2 nodes count") == ROUNDS, log
    assert "left out" not in log, log

    base = BertForSequenceClassification.from_pretrained(model_folder)
    loaded = PeftModel.from_pretrained(base, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    ranks = {name: t.shape[0] for name, t in weights.items() if name.endswith("lora_A.weight")}
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"
    assert max(ranks.values()) > 4, "the remainders of two clients are part of the adapter"
