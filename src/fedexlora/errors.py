"""Every error that fedexlora raises on purpose, and the exit code that each one means.

    FedexLoraError
    ├── InputError                exit 2: what was given is wrong; nothing was started
    │   ├── RecipeError           a recipe's key or value
    │   ├── DataError             a data set, a column, a partition
    │   ├── BridgeError           a model or adapter that cannot be aggregated exactly
    │   ├── AdapterError          adapter folders that cannot be read, or do not fit together
    │   ├── NodeError             a node refuses what a server asks, or fails at it
    │   └── ResumeError           a run folder that cannot be started in or continued
    ├── UpdateError               one client's update in one round; the round goes on without it
    └── RunError                  exit 1: the run failed; its last version is intact
        ├── VersionError          a message does not lead its receiver to the version of now
        │   ├── GapError          its steps begin beyond the version that is held
        │   ├── HistoryError      its steps belong to another history than that version
        │   ├── DigestError       a step, or a part of one, is not the one that was announced
        │   └── SnapshotError     a snapshot is not the one that was announced
        ├── NoUpdatesError        no client delivered a usable update
        ├── DivergenceError       the global model or its score is no number any more
        └── ExactnessError        the applied update is not the ideal one

Errors that collect several faults say all of them at once, one a line. Names in them may come from
somebody else's files or messages, so that nothing which is not printable is part of any.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedexlora.texts import few, outside, printable

_LONGEST, _MOST = 4000, 200
"""Characters of a summary or a fault, and faults."""
_TRAINING = frozenset(
    {
        "accelerate",
        "datasets",
        "flwr_datasets",
        "jinja2",
        "peft",
        "pyarrow",
        "scipy",
        "sklearn",
        "tokenizers",
        "transformers",
    }
)
"""What the extra ``train`` brings."""


class FedexLoraError(Exception):
    """Base of all errors in this module.

    Args:
        summary: what is wrong, and with what (file, key, client, module).
        faults: every single fault, each naming its place, what was expected and what was found.
    """

    exit_code = 1

    def __init__(self, summary: str, faults: Sequence[str] = ()) -> None:
        self.summary = printable(summary, _LONGEST)
        self.faults = tuple(printable(fault, _LONGEST) for fault in few(faults, _MOST))
        super().__init__("\n  ".join((self.summary, *self.faults)))


class InputError(FedexLoraError):
    """The input is wrong; nothing was started and nothing was written."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe has an unknown key or an invalid value."""


class DataError(InputError):
    """A data set lacks a file, a split, a column or rows that the recipe asks for."""


class BridgeError(InputError):
    """A model or adapter cannot be aggregated exactly, or does not match what is applied to it."""


class AdapterError(InputError):
    """A stored adapter cannot be read, is no plain LoRA, or does not fit the others or the base."""


class ResumeError(InputError):
    """A run's folder holds something else than the run that should start or continue in it."""


class NodeError(InputError):
    """A node refuses what a server asks, or fails at it.

    Args:
        code: all that the server is told, of ``fedexlora.exchange.node_faults``.
        summary: for the node's own log.
        faults: for the node's own log.
    """

    def __init__(self, code: str, summary: str, faults: Sequence[str] = ()) -> None:
        self.code = code
        super().__init__(summary, faults)


class UpdateError(FedexLoraError):
    """One client's update is unusable: the client is left out of the round and named.

    Args:
        round_: the round, from 1.
        client: the client's name.
        faults: every fault of the update. All are counted and the first few are kept, as texts
            that hold nothing but printable ASCII: names in them are the client's.
    """

    def __init__(self, round_: int, client: str, faults: Sequence[str]) -> None:
        self.round = round_
        self.client = client
        super().__init__(
            f"round {round_}, client {client!r}: {len(faults)} fault(s) in the update",
            tuple(map(outside, few(faults))),
        )


class RunError(FedexLoraError):
    """The run stopped; its last version is intact and can be resumed."""


class VersionError(RunError):
    """A message is damaged, or does not lead its receiver to the version of now."""


class GapError(VersionError):
    """Steps begin beyond the version that their receiver holds, or end before it."""


class HistoryError(VersionError):
    """Steps lead on from another history than the version that their receiver holds."""


class DigestError(VersionError):
    """A step, a part of one or an adapter has another digest than was announced."""


class SnapshotError(VersionError):
    """A snapshot is not the one that was announced."""


class NoUpdatesError(RunError):
    """No client delivered a usable update in a round."""


class DivergenceError(RunError):
    """The global model, or its score, is not a number: there is nothing to go on from."""


class ExactnessError(RunError):
    """The update that the model applies differs from the ideal one by more than is allowed."""


def of_training(error: ModuleNotFoundError) -> bool:
    """Whether a package is missing that the extra ``train`` brings, and a server may lack."""
    return (error.name or "").partition(".")[0] in _TRAINING
