"""A run's folder: what is in it, and how it is started, continued and never damaged.

recipe.toml     the resolved recipe        run.json      versions, data, score before round 1
rounds.jsonl    one record a round         checkpoints/  the last versions of the global model
adapter/        the final global model     updates/      with --keep-updates, what clients sent
clients.jsonl   over Flower, the key that each client's name belongs to
adapter.json    its worst module, read back from its files
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fedexlora.algebra.lowrank import LowRank
from fedexlora.engine.recipe import Recipe
from fedexlora.errors import ResumeError, RunError
from fedexlora.exchange.files import replace_bytes
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.shipment import History, Holdings
from fedexlora.exchange.state import (
    GlobalState,
    lowrank_from,
    lowrank_tensors,
    refuse_others,
    state_from,
    state_tensors,
    unpack_state,
)
from fedexlora.exchange.untrusted import json_object, number, short
from fedexlora.exchange.wire import pack

LOCK = ".lock"
_CHANGEABLE = ("federation.rounds:", "federation.allow:", "federation.exclude:")
"""Keys in which a resumed run may differ from the one that is in the folder."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

    state: GlobalState
    records: tuple[RoundRecord, ...]
    """One for every finished round."""
    holdings: Holdings
    """What clients hold."""
    earlier: Mapping[int, GlobalState] = field(default_factory=dict)
    """The versions before, of the last rounds; read from disk and never written again."""
    damaged: tuple[str, ...] = ()
    """Newer checkpoints that could not be read, and why."""


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def adapter(self) -> Path:
        """The final global model as a PEFT adapter."""
        return self.path / "adapter"

    def round_updates(self, round_: int) -> Path:
        """What clients sent in one round: a PEFT adapter each."""
        return self.path / "updates" / f"round-{round_:04d}"

    def check_new(self) -> bool:
        """Refuse a folder in which a new run would mix with something else.

        Returns:
            False: there is no run to continue.

        Raises:
            ResumeError: if there is anything in it.
        """
        if self.path.exists() and (
            not self.path.is_dir() or any(map(_counts, self.path.iterdir()))
        ):
            what = "another run" if (self.path / "recipe.toml").exists() else "other files"
            raise ResumeError(
                f"--out {self.path} already holds {what}",
                ["choose another folder, or continue a run with --resume"],
            )
        return False

    def check_same(self, recipe: Recipe) -> bool:
        """Whether there is a run to continue.

        The number of rounds may differ, as a run may be continued for longer, and so may the
        clients that are admitted.

        Returns:
            False if the folder is empty or absent, so that the run starts from the beginning.

        Raises:
            ResumeError: naming every key in which the run's recipe differs from ``recipe``.
        """
        path = self.path / "recipe.toml"
        if not path.exists():
            return self.check_new()
        try:
            held = Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (ValueError, OSError) as error:
            raise ResumeError(f"{path} cannot be read: {error}") from error
        differences = [
            line for line in held.differences(recipe) if not line.startswith(_CHANGEABLE)
        ]
        if differences:
            raise ResumeError(f"{self.path} holds a run of another recipe", differences)
        return True

    def start(self, recipe: Recipe) -> None:
        """Create the folder, or note the recipe of a run that is continued.

        Raises:
            ResumeError: if the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_bytes(self.path / "recipe.toml", recipe.to_toml().encode())
            (self.path / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise ResumeError(f"--out {self.path}: {error.strerror}") from error

    def write_header(self, header: dict[str, Any]) -> None:
        """Write ``run.json``.

        Raises:
            RunError: if it cannot be written.
        """
        path = self.path / "run.json"
        with writing(path):
            replace_bytes(path, json.dumps(header, indent=2).encode())

    def read_header(self) -> dict[str, Any] | None:
        """``run.json``, or None before it was written.

        Raises:
            ResumeError: if it is damaged.
        """
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            return json_object(path.read_bytes())
        except (ValueError, OSError) as error:
            raise ResumeError(f"{path} is damaged: {error}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of the folder until the block ends.

        Raises:
            ResumeError: if another process runs in it, or it cannot be made.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise ResumeError(f"--out {self.path}: another process is running in it") from error
        except OSError as error:
            raise ResumeError(f"--out {self.path}: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def save(self, progress: Progress) -> None:
        """Make a version durable, then its record; a kill in between loses neither.

        The checkpoint carries the record of its round, so that a record which did not reach
        ``rounds.jsonl`` is restored from there, and the piece of remainder that led to it.

        Raises:
            RunError: if a file cannot be written, as on a full disk; what was durable before is.
        """
        version, history = progress.state.version, progress.holdings.history
        last = progress.records[-1].model_dump(mode="json") if progress.records else None
        header = {"version": version, "record": last, "held": dict(progress.holdings.versions)}
        tensors = state_tensors(progress.state)
        tensors |= lowrank_tensors(f"piece{version}", history.pieces.get(version, {}))
        path = self._checkpoint(version)
        with writing(path):
            replace_bytes(path, pack(tensors, header))
        self._write_records(progress.records)
        self.prune(version, history.window)

    def prune(self, version: int, window: int) -> None:
        """Remove the checkpoints that clients which hold a version of the window do not need.

        Raises:
            RunError: if one cannot be removed.
        """
        oldest = self._checkpoint(max(0, version - max(1, window)))
        for path in self._checkpoints():
            if _age(path) < _age(oldest):
                with writing(path):
                    path.unlink()

    def load(self, history: History | None = None) -> Progress | None:
        """The last version that was made durable, or None if there is none.

        A checkpoint that is damaged is passed over for the one before. Records after the version
        that is loaded are dropped: their rounds are run again.

        Args:
            history: an empty one, which comes back with the pieces of the last rounds; without
                it none are read.

        Raises:
            ResumeError: if no checkpoint is whole, or rounds are missing from ``rounds.jsonl``.
        """
        history = history or History(0, {}, ())
        damaged: list[str] = []
        for path in reversed(self._checkpoints()):
            try:
                found = self._load(path, history)
            except (ValueError, KeyError, OSError) as error:
                damaged.append(f"checkpoint {path} is damaged: {error}")
                continue
            self._write_records(found.records)
            return replace(found, damaged=tuple(damaged))
        if damaged:
            raise ResumeError(f"{self.path}: no checkpoint can be read", damaged)
        return None

    def _load(self, path: Path, history: History) -> Progress:
        state, piece, header = self._read(path)
        version, last = state.version, header["record"]
        held = {client: number(header["held"], client) for client in header["held"]}
        if (last is None) != (version == 0) or any(v >= version for v in held.values()):
            raise ValueError(f"its header is not one of version {version}")
        latest = () if last is None else (RoundRecord.model_validate(last),)
        records = (*self.read_records(version - 1), *latest)
        found = [record.round for record in records]
        if len(found) != version or found != list(range(1, version + 1)):
            raise ResumeError(
                f"{self.path / 'rounds.jsonl'}: expected rounds 1 to {version}, found {found}"
            )
        pieces = {version: piece}
        earlier: dict[int, GlobalState] = {}
        for before in range(version - 1, max(-1, version - 1 - history.window), -1):
            try:
                earlier[before], pieces[before], _ = self._read(self._checkpoint(before))
            except (ValueError, KeyError, OSError):
                break  # clients of that version, and older ones, get the total
        kept = {v: piece for v, piece in pieces.items() if v > max(0, version - history.window)}
        starts = {v: held.start() for v, held in {**earlier, version: state}.items()}
        history = replace(history, pieces=kept, starts=starts)
        return Progress(state, records, Holdings(held, history), earlier)

    def _read(self, path: Path) -> tuple[GlobalState, dict[str, LowRank], dict[str, Any]]:
        """A version, the piece that led to it, and the header of its checkpoint."""
        tensors, header = unpack_state(path.read_bytes())
        version = number(header, "version")
        if path != self._checkpoint(version):
            raise ValueError(f"it is one of version {version}")
        if not isinstance(header["held"], dict):
            raise ValueError(f"header 'held': expected an object, found {short(header['held'])}")
        state = state_from(version, tensors)
        shapes = {name: matrix.shape for name, matrix in state.total.items()}
        piece = lowrank_from(f"piece{version}", tensors, shapes)
        refuse_others(tensors, {*state_tensors(state), *lowrank_tensors(f"piece{version}", piece)})
        return state, piece, header

    def _checkpoint(self, version: int) -> Path:
        return self.path / "checkpoints" / f"round-{version:04d}.safetensors"

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"), key=_age)

    def _write_records(self, records: Sequence[RoundRecord]) -> None:
        lines = "".join(f"{record.model_dump_json()}\n" for record in records)
        path = self.path / "rounds.jsonl"
        with writing(path):
            replace_bytes(path, lines.encode())

    def read_records(self, count: int) -> tuple[RoundRecord, ...]:
        """The records of the first ``count`` rounds; fewer if there are fewer.

        Raises:
            ResumeError: if one is damaged.
        """
        path = self.path / "rounds.jsonl"
        if count <= 0 or not path.exists():
            return ()
        try:
            # Not splitlines: JSON may hold other characters that end a line.
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")[:count]
            return tuple(RoundRecord.model_validate_json(line) for line in lines if line)
        except (ValueError, OSError) as error:
            raise ResumeError(f"{path} is damaged: {error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder that cannot be written, as on a full disk.

    Raises:
        RunError: if the block fails for that reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{path} cannot be written: {reason}",
            ["--resume goes on after the last finished round"],
        ) from error


def _age(checkpoint: Path) -> tuple[int, str]:
    """Orders checkpoints by their version, also from 10000 on."""
    return len(checkpoint.name), checkpoint.name


def _counts(path: Path) -> bool:
    """Whether a file says that a folder is taken: not a lock, nor what a kill left of a write."""
    return path.name != LOCK and not (path.name.startswith(".") and path.name.endswith(".tmp"))
