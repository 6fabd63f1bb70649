"""The process that holds a node's model between messages.

Flower starts a new process for every message of a SuperNode. It hands the message on to this one,
which stays, listens on a socket that only the node's user can open, and goes when it is idle.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from fedexlora.errors import NodeError, RecipeError
from fedexlora.exchange.node_faults import NodeFault
from fedexlora.flower.answer_file import AnswerFile
from fedexlora.flower.fault_frames import LogFormatter, fault_frame
from fedexlora.flower.frames import Frame, receive, send
from fedexlora.flower.node import Node, load_node
from fedexlora.local.notices import quiet_libraries

if TYPE_CHECKING:
    from fedexlora.flower.session import Session

_log = logging.getLogger(__name__)
_START_SECONDS = 120.0
"""How long a new worker may take until it listens; it loads nothing heavy before that."""


def ask_worker(path: Path, frame: Frame) -> Frame:
    """Have a node's worker answer a request; start it if there is none.

    One that goes once it has trained leaves its answer on the disk, and that is it then.

    Args:
        path: the node's configuration.
        frame: the request.

    Raises:
        NodeError: if the configuration is wrong, or the worker does not start or goes while it
            works.
    """
    node = _configured(path)
    with closing(_connected(path, node)) as connection:
        try:
            send(connection, frame)
            return receive(connection)
        except (EOFError, OSError) as error:
            if (finished := AnswerFile(node).read(frame)) is not None:
                return finished
            said = f"the worker has gone; its log is {log_file(node)}"
            raise NodeError(NodeFault.WORKER_LOST, said) from error


def log_file(node: Node) -> Path:
    """What the worker says."""
    return node.home / "worker.log"


def pid_file(node: Node) -> Path:
    """The worker's process id while it runs."""
    return node.home / "worker.pid"


def serve(path: Path) -> None:
    """Be the worker of a node until it is idle; return at once if it has one."""
    node = load_node(path)
    node.home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(node.home / "worker.lock", timeout=0):
            _serve(path, node)
    except Timeout:
        _log.info("another worker serves %s", node.home)


def _serve(path: Path, node: Node) -> None:
    address = _address(node)
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        listener.settimeout(node.idle)
        pid_file(node).write_text(str(os.getpid()), encoding="utf-8")
        try:
            _loop(path, node.idle, listener)
        finally:
            address.unlink(missing_ok=True)
            pid_file(node).unlink(missing_ok=True)


def _loop(path: Path, idle: float, listener: socket.socket) -> None:
    desk = Desk(path)
    gc.freeze()  # every training ends in a full collection; it need not go through all libraries
    while True:
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            _log.info("idle for %g s: going", idle)
            return
        accepted.settimeout(None)
        with closing(Connection(accepted.detach())) as connection:
            try:
                send(connection, desk.answer(receive(connection)))
            except (EOFError, OSError):
                _log.warning("whoever asked has gone; its answer is dropped")


class Desk:
    """A node's session under the configuration of now.

    Args:
        path: the configuration; read again for every request, as what it allows may have changed.
    """

    def __init__(self, path: Path) -> None:
        from fedexlora.flower import session  # loads the training libraries

        self._open = session.Session
        self._path = path
        self._session: Session | None = None

    def answer(self, frame: Frame) -> Frame:
        """The reply to one of the server's requests; it never raises."""
        try:
            node = _configured(self._path)
            if self._session is None or self._session.node != node:
                self._session = self._open(node, node.home / "held.safetensors")
            return self._session.answer(frame)
        except Exception as error:  # noqa: BLE001 - its text must not leave the node
            return fault_frame(error)


def _configured(path: Path) -> Node:
    """The node's configuration as it is now.

    Raises:
        NodeError: if it cannot be read, or is wrong.
    """
    try:
        return load_node(path)
    except RecipeError as error:
        raise NodeError(NodeFault.CONFIGURATION_INVALID, error.summary, error.faults) from error


def _connected(path: Path, node: Node) -> Connection:
    """A connection to the node's worker, which is started if none listens."""
    ends = time.monotonic() + _START_SECONDS
    started: subprocess.Popen[bytes] | None = None
    while time.monotonic() < ends:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(str(_address(node)))
        except OSError:
            link.close()
            if started is None or started.poll() is not None:
                started = _start(path, node)
            time.sleep(0.2)
            continue
        return Connection(link.detach())
    said = f"the worker does not start; its log is {log_file(node)}"
    raise NodeError(NodeFault.WORKER_LOST, said)


def _start(path: Path, node: Node) -> subprocess.Popen[bytes]:
    node.home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fedexlora.flower.worker", str(path)]
    with log_file(node).open("ab") as log:
        # A session of its own: it outlives the process of the message that started it.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _address(node: Node) -> Path:
    """The socket's file: below a folder of the user's own, as long paths cannot be bound."""
    folder = Path(tempfile.gettempdir()) / f"fedexlora-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        said = f"{folder} is open to other users: expected a folder of mode 700"
        raise NodeError(NodeFault.WORKER_LOST, said)
    name = hashlib.sha256(str(node.home.resolve()).encode()).hexdigest()[:16]
    return folder / f"{name}.sock"


if __name__ == "__main__":
    # Flower's processes must start within 30 s, also where training takes every processor.
    os.nice(5)
    quiet_libraries()
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    serve(Path(sys.argv[1]))
