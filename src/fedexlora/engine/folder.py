"""A run's folder: what is in it, and how it is started, continued and never damaged.

recipe.toml     the resolved recipe        run.json      versions, data, score before round 1
rounds.jsonl    one record a round         checkpoints/  the last versions of the global model
adapter/        the final global model     updates/      with --keep-updates, what clients sent
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedexlora.engine.recipe import Recipe
from fedexlora.errors import ResumeError
from fedexlora.exchange.files import replace_bytes
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.state import GlobalState, state_from, state_tensors
from fedexlora.exchange.wire import pack, unpack

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

    state: GlobalState
    records: tuple[RoundRecord, ...]
    """One for every finished round."""


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

        The number of rounds may differ: a run may be continued for longer.

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
            line for line in held.differences(recipe) if not line.startswith("federation.rounds:")
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
        """Write ``run.json``."""
        replace_bytes(self.path / "run.json", json.dumps(header, indent=2).encode())

    def read_header(self) -> dict[str, Any] | None:
        """``run.json``, or None before it was written.

        Raises:
            ResumeError: if it is damaged.
        """
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResumeError(f"{path} is damaged: {error}") from error
        return dict(header)

    def save(self, progress: Progress) -> None:
        """Make a version durable, then its record; a kill in between loses neither.

        The checkpoint carries the record of its round, so that a record which did not reach
        ``rounds.jsonl`` is restored from there.
        """
        version = progress.state.version
        last = progress.records[-1].model_dump(mode="json") if progress.records else None
        content = pack(state_tensors(progress.state), {"version": version, "record": last})
        replace_bytes(self._checkpoint(version), content)
        self._write_records(progress.records)
        for path in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            path.unlink()

    def load(self) -> Progress | None:
        """The last version that was made durable, or None if there is none.

        Records after it, of a round that was not finished, are dropped.

        Raises:
            ResumeError: if the checkpoint is damaged or rounds are missing from ``rounds.jsonl``.
        """
        paths = self._checkpoints()
        if not paths:
            return None
        path = paths[-1]
        try:
            tensors, header = unpack(path.read_bytes())
            version, last = int(header["version"]), header["record"]
            state = state_from(version, tensors)
            records = self.read_records(version - 1)
            if last is not None:
                records = (*records, RoundRecord.model_validate(last))
        except (ValueError, KeyError) as error:
            raise ResumeError(f"checkpoint {path} is damaged: {error}") from error
        if [record.round for record in records] != list(range(1, version + 1)):
            raise ResumeError(
                f"{self.path / 'rounds.jsonl'}: expected rounds 1 to {version}, "
                f"found {[record.round for record in records]}"
            )
        self._write_records(records)
        return Progress(state, records)

    def _checkpoint(self, version: int) -> Path:
        return self.path / "checkpoints" / f"round-{version:04d}.safetensors"

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"))

    def _write_records(self, records: Sequence[RoundRecord]) -> None:
        lines = "".join(f"{record.model_dump_json()}\n" for record in records)
        replace_bytes(self.path / "rounds.jsonl", lines.encode())

    def read_records(self, count: int) -> tuple[RoundRecord, ...]:
        """The records of the first ``count`` rounds; fewer if there are fewer.

        Raises:
            ResumeError: if one is damaged.
        """
        path = self.path / "rounds.jsonl"
        if count <= 0 or not path.exists():
            return ()
        lines = path.read_text(encoding="utf-8").splitlines()[:count]
        try:
            return tuple(RoundRecord.model_validate_json(line) for line in lines)
        except ValidationError as error:
            raise ResumeError(f"{path} is damaged: {error}") from error


def _counts(path: Path) -> bool:
    """Whether a file says that a folder is in use: not what a kill left of an unfinished write."""
    return not (path.name.startswith(".") and path.name.endswith(".tmp"))
