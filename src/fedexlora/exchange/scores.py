"""What clients found of a version on rows of their own: checked, and taken together.

A client sends plain numbers under names that the server knows. Where a metric is a mean over rows
or over targets, the means of all clients and their counts give that of all rows; where it is not,
as F1 or a perplexity, there is the plain mean of the clients', and it is called that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from typing import Any

from fedexlora.errors import UpdateError
from fedexlora.exchange.records import ClientScores, FinishRecord, RoundRecord, ScoresRecord
from fedexlora.exchange.untrusted import LARGEST, short
from fedexlora.exchange.wire import pack, unpack

_OVER_ROWS, _OVER_TARGETS = ("accuracy",), ("loss", "mse")
_SHARES = ("accuracy", "f1", "matthews", "pearson", "spearman")
"""Metrics of an absolute value of at most 1."""
_LARGEST_SCORE = 1e15
"""Of any other: sums of all clients' rows times it are still numbers."""
LARGEST_REPORT = 4096
"""Bytes of a report: a few names, digests and numbers."""


def scores_header(scores: ClientScores) -> dict[str, Any]:
    """The field of a header that :func:`scores_from` reads."""
    return scores.model_dump()


def scores_from(found: object, metrics: Collection[str]) -> tuple[ClientScores | None, list[str]]:
    """Scores that somebody else sent.

    Args:
        found: what a header holds; anything that JSON holds.
        metrics: the names that there must be, and no other.

    Returns:
        The scores, or None with every fault.
    """
    keys = {"rows", "targets", "metrics"}
    if not isinstance(found, dict) or found.keys() != keys:
        return None, [f"scores: expected {sorted(keys)}, found {short(found)}"]
    faults = [
        f"scores: {key}: expected a whole number from 1, found {short(found[key])}"
        for key in ("rows", "targets")
        if type(found[key]) is not int or not 1 <= found[key] <= LARGEST
    ]
    values = found["metrics"]
    if not isinstance(values, dict) or values.keys() != set(metrics):
        named = sorted(values) if isinstance(values, dict) else values
        faults.append(f"scores: expected {sorted(metrics)}, found {short(named)}")
    else:
        faults += [
            f"scores: {name}: expected a number of at most {_most(name):g}, found {short(value)}"
            for name, value in values.items()
            if type(value) is not float or not isfinite(value) or abs(value) > _most(name)
        ]
    return (None, faults) if faults else (ClientScores(**found), [])


def _most(name: str) -> float:
    return 1.0 if name in _SHARES else _LARGEST_SCORE


def taken_together(version: int, scores: Sequence[ClientScores]) -> ScoresRecord:
    """What the scores of several clients say of one version.

    Args:
        version: the version.
        scores: at least one, in any order: sums are rounded once.
    """
    rows, targets = (fsum(getattr(x, key) for x in scores) for key in ("rows", "targets"))
    counts = dict.fromkeys(_OVER_ROWS, ("rows", rows))
    counts |= dict.fromkeys(_OVER_TARGETS, ("targets", targets))
    pooled, means = {}, {}
    for name in sorted(scores[0].metrics):
        if name in counts:
            key, whole = counts[name]
            pooled[name] = fsum(x.metrics[name] * getattr(x, key) for x in scores) / whole
        else:
            means[name] = fsum(x.metrics[name] for x in scores) / len(scores)
    return ScoresRecord(
        version=version,
        clients=len(scores),
        rows=int(rows),
        targets=int(targets),
        pooled=pooled,
        mean_of_clients=means,
    )


def scores_by_version(
    initial: Mapping[str, float], records: Iterable[RoundRecord], finish: FinishRecord | None
) -> dict[int, dict[str, float]]:
    """Scores by version, 0 before round 1: the server's, or else those of the clients.

    Args:
        initial: of version 0; empty if nobody has scored it.
        records: of the rounds.
        finish: what followed the last one, where clients score.
    """
    found: dict[int, dict[str, float]] = {}
    served = {0: dict(initial)} if initial else {}
    for record in records:
        if record.scores is not None:
            found[record.scores.version] = dict(record.scores.metrics)
        if record.metrics:
            served[record.round] = dict(record.metrics)
    if finish is not None and finish.scores is not None:
        found[finish.version] = dict(finish.scores.metrics)
    return dict(sorted((found | served).items()))


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """What a client sends that has scored a version, and was not asked to train."""

    client: str
    version: str
    """The id of the version."""
    base: str
    """Fingerprint of the base model."""
    scores: ClientScores

    def encode(self) -> bytes:
        """This report as one message."""
        said = {"client": self.client, "version": self.version, "base": self.base}
        return pack({}, {**said, "scores": scores_header(self.scores)})


def decode_report(
    message: bytes,
    round_: int,
    metrics: Collection[str],
    expected: Mapping[str, str],
) -> ClientScores:
    """The scores of a report, held against what was agreed.

    Args:
        message: what arrived.
        round_: the last round, which errors name.
        metrics: the scores that there must be.
        expected: ``client``, the id of the ``version`` and the fingerprint of the ``base``.

    Raises:
        UpdateError: naming every fault.
    """
    client = expected["client"]
    if len(message) > LARGEST_REPORT:
        fault = f"a report of {len(message)} bytes, expected at most {LARGEST_REPORT}"
        raise UpdateError(round_, client, [fault])
    try:
        tensors, header = unpack(message)
    except ValueError as error:
        raise UpdateError(round_, client, [str(error)]) from error
    faults = [
        f"{key}: expected {wanted!r}, found {short(header.get(key))}"
        for key, wanted in expected.items()
        if header.get(key) != wanted
    ]
    if tensors or header.keys() != {*expected, "scores"}:
        faults.append(f"a report with {len(tensors)} tensor(s) and {short(sorted(header))}")
    scores, more = scores_from(header.get("scores"), metrics)
    if scores is None or faults:
        raise UpdateError(round_, client, [*faults, *more])
    return scores
