"""One JSON record a round: the only thing that reports and tables are made from.

Times are under keys named ``seconds`` and nowhere else: the rest of a record is the same, bit for
bit, however often a run is repeated or resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedexlora.texts import few, printable

_LONGEST = 400


def _bounded(reasons: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(printable(text.replace("\n", "\\n"), _LONGEST) for text in few(reasons))


class Record(BaseModel):
    """Base of all records: immutable, and strict about what it holds."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        # JSON has no NaN; as null, the score of a model that diverged could not be read again.
        ser_json_inf_nan="strings",
    )


def _absent(value: object) -> bool:
    return value is None


class ClientScores(Record):
    """Scores of a version on a client's own held-out rows."""

    rows: int
    targets: int
    """What the loss is the mean of: tokens of a language model, else rows."""
    metrics: dict[str, float]


class ScoresRecord(Record):
    """Scores of one version by the clients, each on its own held-out rows."""

    version: int
    """Which one: the one that a round starts from, which its clients score before they train."""
    clients: int
    """How many scored it."""
    rows: int
    targets: int
    """What the loss is the mean of: tokens of a language model, else rows."""
    pooled: dict[str, float]
    """Over all clients' rows: of metrics that are means over rows or targets."""
    mean_of_clients: dict[str, float]
    """The plain mean of the clients' scores, of all other metrics."""

    @property
    def metrics(self) -> dict[str, float]:
        """Both, by name."""
        return self.pooled | self.mean_of_clients


class HolderRecord(Record):
    """A holder's half of the certificate: its live model against the version that it holds."""

    error: float
    """|live model - version| / |version| of the module that is farthest off."""
    bound: float
    """What that is at most."""
    allowed: float
    """The largest that is accepted: rounding of a folded weight is part of it."""
    forward: float
    """The largest ``forward`` of a module."""
    kept: float | None
    """The share of the remainder that comes out of its layers, over some of its rows; 1 is all.
    None where there is no remainder."""
    kept_error: float | None
    """The standard error of ``kept``."""


class HoldersRecord(Record):
    """The worst of what a round's clients say of their models, when they have come to a version."""

    version: int
    """Which one: the one that the round starts from."""
    clients: int
    """How many say it."""
    worst_client: str
    """Whose error is the largest share of what is allowed."""
    error: float
    bound: float
    allowed: float
    worst_forward_client: str
    forward: float
    worst_kept_client: str | None
    kept: float | None
    kept_error: float | None
    held: bool
    """Whether every one's bound is within what is allowed of it."""


class ClientRecord(Record):
    """A client whose update is part of the round."""

    client: str
    num_examples: int
    weight: float
    """Its share of the mean, 0 to 1."""
    loss: float
    """Mean training loss of the round."""
    counted: float
    """The share of its change that counts; below 1 if it was clipped."""
    norm: float | None
    """Length of its change of the global model, all modules and heads; None without a rule against
    bad updates."""
    staleness: int
    """Rounds between the version that it was trained from and that of this round; 0 if in time."""
    since: int | None
    """The version that it held before the round; None for nothing."""
    downloaded_bytes: int
    """What brought it from there to the version that it trained from."""
    uploaded_bytes: int
    seconds: float
    """Local training, and scoring before it."""
    memory: int | None = None
    """The round of what the client remembered of the method when it began, 0 for nothing; None
    where the method remembers nothing."""
    scores: ClientScores | None = Field(default=None, exclude_if=_absent)
    """Of the version that it was trained from; absent where clients do not score."""
    holder: HolderRecord | None = Field(default=None, exclude_if=_absent)
    """Of its model at that version, before it trained; absent where the server has a model."""


class LeftOutRecord(Record):
    """A client that took part but whose update is not in the aggregate."""

    client: str
    reasons: Annotated[tuple[str, ...], AfterValidator(_bounded)]
    """The first few, cut; whatever a client sends, what is written of it is bounded."""
    since: int | None
    """The version that it held before the round; None for nothing."""
    downloaded_bytes: int
    uploaded_bytes: int


class FinishedClient(Record):
    """A client that holds the final version, and has scored it."""

    client: str
    since: int | None
    """The version that it held before; None for nothing."""
    downloaded_bytes: int
    uploaded_bytes: int
    scores: ClientScores


class ModuleRecord(Record):
    """One adapted module: its certificate, and what plain averaging would have lost."""

    module: str
    ideal: float
    """Frobenius norm of the ideal update since the untouched base, scaled."""
    error: float
    """|applied - ideal| / |ideal|: the step against the plain float64 sum of what was received, and
    the live model, which is read back, against the adapter and all remainders."""
    bound: float
    """What ``error`` is at most: of a large module it is an estimate by random probes, and larger
    than this with a chance of 1e-9."""
    allowed: float
    """The largest error that is accepted, in the same unit: rounding, and what is truncated."""
    forward: float | None
    """|what the layer multiplies by - the same at version 0 - update| / |update|, every operand
    rounded to the dtype in which the layer multiplies it; the worse of training and scoring.
    None where the server has no model: then the holders say it."""
    kept: float | None
    """The share of the remainder that comes out of the layer, over validation rows; 1 is all. None
    where there is no remainder, or no rows."""
    kept_error: float | None
    """The standard error of ``kept``."""
    deviation: float
    """|R| / |M|: the share of this round's mean product that averaging the factors loses."""
    truncated: float
    """What the method left out of this round's remainder on purpose, as a share of the ideal."""
    added: float = 0.0
    """What the method added to this round's mean update on purpose, as momentum, as a share of the
    ideal, which it is part of."""
    memory_error: float = 0.0
    """What the server's memory of the module lacks, as it is held at a lower rank, as a share of
    the ideal; the next round adds that much less."""
    placement: str
    """Where the remainder lives: ``fold``, in the frozen weight, or ``side``, beside it;
    ``clients`` where the server has no model."""
    remainder: str
    """How the cumulative remainder is held: ``none``, ``rank N`` or ``dense``."""
    mean_product: float | None = None
    """|M|: Frobenius norm of this round's mean product, scaled; ``deviation`` is a share of it.
    None in records of before, as the two that follow."""
    remainder_norm: float | None = None
    """Frobenius norm of the cumulative remainder, scaled; of a large module, by random probes."""
    bf16_loss: float | None = None
    """The share of the cumulative remainder that a fold into a bfloat16 weight would lose, over up
    to 32 rows of the module; None too where there is no remainder."""


class OwnRecord(Record):
    """A client that continues from an adapter of its own: does it hold the same global model?"""

    client: str
    error: float
    """|applied - ideal| / |ideal| over all modules, as the client applies it."""
    bound: float
    """What that is at most."""
    held: bool
    """Whether every module is within what is allowed of it."""


class CertificateRecord(Record):
    """All modules together, and the dense tensors."""

    placement: str
    """Where the remainder lives: ``fold``, ``side``, or ``fold and side`` by module; ``clients``
    where the server has no model."""
    error: float
    """|applied - ideal| / |ideal| over all modules; that of the step where the server has no model,
    and what holders make of it is in the round's ``holders``."""
    bound: float
    """What that is at most."""
    allowed: float
    """The largest error that is accepted, in the same unit."""
    truncated: float
    """What the method left out of this round's remainder on purpose, as a share of the ideal."""
    worst_module: str
    worst_error: float
    forward: float | None
    """The modules' ``forward`` over all modules."""
    worst_forward_module: str | None
    worst_forward: float | None
    kept: float | None
    """The modules' ``kept`` over all modules."""
    kept_error: float | None
    """The standard error of ``kept``."""
    dense_error: float
    """The same of the worst head or bias; 0 where there are none."""
    own: tuple[OwnRecord, ...]
    """Clients with adapters of their own; none if all continue from the same one."""
    held: bool
    """Whether what every module's error is at most is within what is allowed."""


class BytesRecord(Record):
    """Bytes moved in the round, over all clients: the lengths of the messages themselves."""

    up: int
    down: int


MOST_FORWARD = 1e-2
"""Largest forward error of a module that needs no word: 16-bit factors are a fifth of that off."""


class RoundRecord(Record):
    """One round."""

    schema_version: int = 3
    round: int
    """From 1."""
    registered: int
    """How many clients there are; those that were asked are in ``clients`` and ``left_out``."""
    method: str
    clients: tuple[ClientRecord, ...]
    left_out: tuple[LeftOutRecord, ...]
    stay: float
    """The share of the mean that stays with the version that the round started from: what clipped
    clients lose."""
    bytes: BytesRecord
    deviation: float
    """|R| / |M| over all modules, scaled: what FedIT would have lost in this round."""
    certificate: CertificateRecord
    modules: tuple[ModuleRecord, ...]
    metrics: dict[str, float]
    """Scores of the new global model on the validation rows; empty in rounds without scores. What
    has a slash in its name is a count, such as ``gsm8k/unparsed``."""
    scores: ScoresRecord | None = Field(default=None, exclude_if=_absent)
    """By the clients, of the version that the round started from; absent where clients do not
    score, or did not in this round."""
    holders: HoldersRecord | None = Field(default=None, exclude_if=_absent)
    """The clients' half of the certificate; absent where the server has a model."""
    seconds: dict[str, float]
    """Wall-clock seconds by phase."""


class FinishRecord(Record):
    """What followed the last round: its clients came to the final version, and scored it."""

    version: int
    clients: tuple[FinishedClient, ...]
    left_out: tuple[LeftOutRecord, ...]
    bytes: BytesRecord
    """Beside those of the rounds."""
    scores: ScoresRecord | None
    """None if nobody scored it."""
    seconds: float


def score_text(scores: Mapping[str, float], name: str) -> str:
    """A score for people to read; nothing where there is none.

    >>> score_text({"gsm8k": 0.25, "gsm8k/unparsed": 3.0}, "gsm8k/unparsed")
    '3'
    """
    if name not in scores:
        return ""
    return f"{scores[name]:.0f}" if "/" in name else f"{scores[name]:.4f}"
