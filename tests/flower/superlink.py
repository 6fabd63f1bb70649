"""A SuperLink that simulates nodes, for one test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def superlink(environment: Mapping[str, str], port: str, control: str) -> Iterator[None]:
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


def environment_of(folder: Path, port: str, control: str) -> dict[str, str]:
    """What ``flwr run`` and the SuperLink need; Flower's files are in ``folder``."""
    return os.environ | {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }


def flwr_run(app: Path, home: Path, *words: str) -> str:
    """What ``flwr run`` says of an app that Flower simulates, in a SuperLink of its own."""
    port, control = free_ports(2)
    environment = environment_of(home, port, control)
    command = [BIN / "flwr", "run", app, "--stream", *words]
    with superlink(environment, port, control):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return log
