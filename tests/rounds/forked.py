"""Runs in forked processes that die, or run out of disk, at a chosen moment."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from fedexlora.exchange import files
from fedexlora.exchange.digest_file import DigestWriter
from fedexlora.local.clients import LocalClients
from fedexlora.local.job import JobResult
from fedexlora.local.trainer import TrainerJob
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds import loop
from fedexlora.rounds import round as round_module
from fedexlora.rounds import run as run_module
from fedexlora.rounds import written as written_module
from fedexlora.rounds.admission import Admission
from fedexlora.rounds.prepared import Prepared
from fedexlora.rounds.reduction import Reducer


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a copy of this process: 0, 1 if it raised, or minus the signal it died of."""
    torch.set_num_threads(1)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the child must never return into pytest
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Moments:
    """Counts what a run does, one by one, and acts at the n-th: that of a kill, by default."""

    def __init__(self, last: int = 0) -> None:
        self.last, self.count = last, 0

    def reached(self) -> bool:
        self.count += 1
        return self.count == self.last

    def pass_by(self) -> None:
        if self.reached():
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: object, name: str) -> None:
        """Make every call of ``owner.name`` a moment."""
        call = getattr(owner, name)

        def counted(*args, **kwargs):
            self.pass_by()
            return call(*args, **kwargs)

        setattr(owner, name, counted)

    def watch_stores(self, act: Callable[[], None]) -> None:
        """Act in the midst of every step and snapshot that is written, and before its header."""
        added, finished = DigestWriter.add, DigestWriter.finish

        def add(file: DigestWriter, name: str, tensor: torch.Tensor) -> str:
            first = file._writer._offset == 0
            digest = added(file, name, tensor)
            if first:
                file._writer._file.flush()
                act()
            return digest

        def finish(file: DigestWriter, header: Mapping) -> None:
            act()
            finished(file, header)

        DigestWriter.add, DigestWriter.finish = add, finish

    def watch(self) -> None:
        """Every write, also in its midst, every change of a folder, every step of a round."""
        written = files._write

        def halves(path: Path, content: bytes, *, sync: bool = True) -> None:
            self.pass_by()
            path.write_bytes(content[: len(content) // 2])
            self.pass_by()
            written(path, content, sync=sync)

        appended = files._append

        def half_lines(path: Path, content: bytes) -> None:
            self.pass_by()
            if self.count + 1 == self.last:
                appended(path, content[: len(content) // 2])
            self.pass_by()
            appended(path, content)

        files._write, files._append = halves, half_lines
        self.watch_stores(self.pass_by)
        for owner, name in (
            *((files, name) for name in ("_sync", "sync_folder")),
            *((Path, name) for name in ("replace", "unlink", "mkdir")),
            (shutil, "rmtree"),
            (round_module, "_certified"),
            *((Admission, name) for name in ("draw", "ask", "receive", "_hear")),
            (Reducer, "reduce"),
            (AdaptedModel, "apply"),
            (loop, "run_round"),
            *((written_module, name) for name in ("write_global", "write_factors")),
        ):
            self.before(owner, name)


class FullDisk(Moments):
    """From the n-th write on, there is no space left; what fitted of it is there."""

    def watch(self) -> None:
        written = files._write

        def write(path: Path, content: bytes, *, sync: bool = True) -> None:
            if self.reached() or self.count > self.last > 0:
                path.write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written(path, content, sync=sync)

        appended = files._append

        def append(path: Path, content: bytes) -> None:
            if self.reached() or self.count > self.last > 0:
                with path.open("ab") as file:
                    file.write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            appended(path, content)

        files._write, files._append = write, append

        def stop() -> None:
            if self.reached() or self.count > self.last > 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.watch_stores(stop)


def quick(made: tuple[Prepared, LocalClients] | None, failing: float = 0.0) -> None:
    """Make runs of this process cheap and repeatable to the last bit, times included.

    Local training adds seeded noise, or fails, in a share of cases: with an error, a NaN, or a
    loss that is not finite.
    """

    def train(job, model, rows, *, seed, round_, on_step):
        fate = random.Random(seed)
        way = fate.choice(("raises", "nan", "loss")) if fate.random() < failing else "good"
        on_step(1, 2)
        generator = torch.Generator().manual_seed(fate.getrandbits(60))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
                    if way == "nan":
                        parameter.reshape(-1)[0] = float("nan")
        if way == "raises":
            raise RuntimeError("went away after training")
        return JobResult(float("inf") if way == "loss" else 1.0, 1, len(rows))

    def score(self, observer):
        if self.model is None:
            return {}
        parameters = self.model.peft_model.parameters()
        return {"accuracy": float(sum(p.detach().double().sum() for p in parameters))}

    TrainerJob.train = train
    Prepared.evaluate = score
    run_module.prepare = lambda recipe, observer: made
    time.perf_counter = lambda: 0.0
    os.fsync = lambda descriptor: None


def count(work: Callable[[Moments], None], moments: Moments, folder: Path) -> int:
    """How many moments ``work`` has; it ends well."""
    told = folder / "moments"

    def counted() -> None:
        work(moments)
        told.write_text(str(moments.count))

    if forked(counted):
        pytest.fail("the undisturbed run failed")
    found = int(told.read_text())
    told.unlink()
    return found
