"""A run's folder: what is in it, and how it is started, continued and never damaged.

recipe.toml     the resolved recipe        run.json      versions, data, score before round 1
rounds.jsonl    one record a round         versions/     the steps of the global model
adapter/        the final global model     updates/      with --keep-updates, what clients sent
spool/          what clients have sent in the round that is open
clients.jsonl   over Flower, the key that each client's name belongs to
run-id          over Flower, what tells the run from others of the same recipe
adapter.json    which version it is, and its worst module, read back from its files
adapter-best/   the version with the best headline score, if there are scores
finish.json     where clients score: what they say of the final version
report.html     the run as one page        tracking.json with trackers, what they have been told
memory/         of simulated clients, what they remember of the method
adapters/       of a method without a global model, every client's own PEFT adapter
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedexlora.errors import ResumeError, VersionError
from fedexlora.exchange.files import append_bytes, cut_off, replace_bytes, writing
from fedexlora.exchange.history import Holdings
from fedexlora.exchange.records import FinishRecord, RoundRecord
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.untrusted import json_object
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.record_lines import RecordLines
from fedexlora.rounds.store import VersionStore

LOCK, FINISH = ".lock", "finish.json"
_CHANGEABLE = (
    "federation.patience:",
    "federation.allow:",
    "federation.exclude:",
    "training.device:",
    "tracking.",
)
"""Keys in which a resumed run may differ from the one that is in the folder."""
_ROUNDS = "federation.rounds:"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

    state: GlobalState
    records: Sequence[RoundRecord]
    """One for every finished round."""
    holdings: Holdings
    """What clients hold."""
    damaged: Mapping[Path, str] = field(default_factory=dict)
    """Files of the store that could not be read, and why."""


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = VersionStore(path / "versions")

    @property
    def adapter(self) -> Path:
        """The final global model as a PEFT adapter."""
        return self.path / "adapter"

    @property
    def best_adapter(self) -> Path:
        """The same of the version with the best headline score."""
        return self.path / "adapter-best"

    @property
    def adapter_record(self) -> Path:
        """What is said of both."""
        return self.path / "adapter.json"

    @property
    def memory(self) -> Path:
        """What simulated clients remember of the method."""
        return self.path / "memory"

    @property
    def adapters(self) -> Path:
        """Where there is no global model: the clients' own, as PEFT adapters."""
        return self.path / "adapters"

    @property
    def spool(self) -> Path:
        """The updates of the round that is open."""
        return self.path / "spool"

    def clear_spool(self) -> None:
        """Remove the updates of a round that is over."""
        shutil.rmtree(self.spool, ignore_errors=True)

    def round_updates(self, round_: int) -> Path:
        """What clients sent in one round: a PEFT adapter each."""
        return self.path / "updates" / f"round-{round_:04d}"

    def has_ended(self, recipe: Recipe) -> bool:
        """Whether the run has made all of its rounds, or as many as its patience has let it."""
        written = self.adapters if recipe.rule.personal else self.adapter
        if not written.is_dir():
            return False
        rounds = len(self.read_records(recipe.federation.rounds))
        if rounds >= recipe.federation.rounds:
            return True
        try:
            said = json_object(self.adapter_record.read_bytes())
        except (OSError, ValueError):
            return False
        return said.get("stopped") is True and said.get("version") == rounds

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

        The number of rounds may differ, as a run may be continued for longer, unless they share one
        learning-rate schedule; and so may the clients that are admitted, and the device.

        Returns:
            False if the folder is empty or absent, so that the run starts from the beginning.

        Raises:
            ResumeError: naming every key in which the run's recipe differs from ``recipe``.
        """
        path = self.path / "recipe.toml"
        if not path.exists():
            return self.check_new()
        self.check_layout()
        try:
            held = Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (ValueError, OSError) as error:
            raise ResumeError(f"{path} cannot be read: {error}") from error
        differences = [
            line
            for line in held.differences(recipe)
            if not line.startswith(_CHANGEABLE)
            and not (line.startswith(_ROUNDS) and recipe.training["schedule"] == "round")
        ]
        if differences:
            if any(line.startswith(_ROUNDS) for line in differences):
                differences.append(
                    "training.schedule: 'run' has one schedule over all rounds; those that were "
                    "run would have had other learning rates"
                )
            raise ResumeError(f"{self.path} holds a run of another recipe", differences)
        return True

    def check_layout(self) -> None:
        """Refuse the folder of a run that an older version of the package has made.

        Raises:
            ResumeError: if it is one.
        """
        if (self.path / "checkpoints").exists():
            raise ResumeError(
                f"{self.path} holds a run of an older fedexlora, with its versions in checkpoints/",
                ["finish or export it with that version, or start a new run in another folder"],
            )

    def start(self, recipe: Recipe) -> None:
        """Create the folder, or note the recipe of a run that is continued.

        Raises:
            ResumeError: if the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_bytes(self.path / "recipe.toml", recipe.to_toml().encode())
            self.store.path.mkdir(exist_ok=True)
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

    def write_finish(self, record: FinishRecord) -> None:
        """Write ``finish.json``.

        Raises:
            RunError: if it cannot be written.
        """
        path = self.path / FINISH
        with writing(path):
            replace_bytes(path, record.model_dump_json(indent=2).encode())

    def read_finish(self) -> FinishRecord | None:
        """``finish.json``, or None if there is none.

        Raises:
            ResumeError: if it is damaged.
        """
        path = self.path / FINISH
        if not path.exists():
            return None
        try:
            return FinishRecord.model_validate_json(path.read_bytes())
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
            with suppress(OSError):  # what a run that stopped has begun
                self.store.discard()
            lock.release()

    def begin(self, state: GlobalState, holdings: Holdings) -> None:
        """Make version 0 durable.

        Raises:
            RunError: if a file cannot be written, as on a full disk.
        """
        with writing(self.store.snapshot_file(0)):
            self.store.add_snapshot(state, holdings)
        with writing(self._records):
            append_bytes(self._records, b"")

    def save(
        self,
        state: GlobalState,
        holdings: Holdings,
        record: RoundRecord,
        best: int | None = None,
    ) -> None:
        """Make a version durable, with the record of its round; what leads to the best one stays.

        The record comes first: it is one of no version, and dropped, until the step that was
        written in the round has its name. A kill in between loses the round, and nothing else.

        Raises:
            RunError: if a file cannot be written, as on a full disk; what was durable before is.
        """
        with writing(self._records):
            append_bytes(self._records, f"{record.model_dump_json()}\n".encode())
        with writing(self.store.step_file(state.version)):
            self.store.commit(state.version)
        with writing(self.store.path):
            self.store.keep_snapshots(state, holdings, best)

    def settle(self, progress: Progress, best: int | None = None) -> None:
        """Remove what is beyond the version that a run goes on from, and do what a kill cut off.

        Raises:
            RunError: if a file cannot be written or removed.
        """
        with writing(self.store.path):
            self.store.settle(progress.state, progress.holdings, progress.damaged, best)
        lines = self.read_records(progress.state.version)
        with writing(self._records):
            cut_off(self._records, lines.size)

    def load(self, window: int = 0) -> Progress | None:
        """The last version that was made durable, or None if there is none; writes nothing.

        A step that is damaged is passed over with those after it. Records after the version that
        is loaded are dropped: their rounds are run again.

        Args:
            window: how many steps clients are promised.

        Raises:
            ResumeError: if no version can be read, or rounds are missing from ``rounds.jsonl``.
        """
        try:
            stored = self.store.read(window)
        except VersionError as error:
            raise ResumeError(error.summary, error.faults) from error
        except OSError as error:  # of the disk, not of what is on it: nothing is taken for damaged
            raise ResumeError(f"{self.store.path} cannot be read: {error}") from error
        if stored is None:
            return None
        version = stored.state.version
        records = self.read_records(version)
        if (found := records.rounds) != list(range(1, version + 1)):
            raise ResumeError(
                f"{self._records}: expected rounds 1 to {version}, found {found}",
                [f"the last version in {self.store.path} is {version}"],
            )
        return Progress(stored.state, records, stored.holdings, stored.damaged)

    @property
    def _records(self) -> Path:
        return self.path / "rounds.jsonl"

    def read_records(self, count: int) -> RecordLines:
        """The records of the first ``count`` rounds; fewer if there are fewer.

        A last line that was cut off is none.

        Raises:
            ResumeError: if one is damaged.
        """
        try:
            return RecordLines(self._records, count)
        except (ValueError, OSError) as error:
            raise ResumeError(f"{self._records} is damaged: {error}") from error


def _counts(path: Path) -> bool:
    """Whether a file says that a folder is taken: not a lock, nor what a kill left of a write."""
    return path.name != LOCK and not (path.name.startswith(".") and path.name.endswith(".tmp"))
