"""What clients say of versions: scores on rows of their own, and their half of the certificate.

Records have it where ``evaluation.where`` is ``clients``, or where the server has no model; others
have none of it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _View(BaseModel):
    """Some keys of a record; the others are not looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class OwnScores(_View):
    """A client's scores on its own rows."""

    rows: int
    metrics: dict[str, float]


class ScoredClient(_View):
    """A client, and its scores if it has any."""

    client: str
    staleness: int = 0
    """How many versions its scores are behind the one that the round started from."""
    scores: OwnScores | None = None


class VersionScores(_View):
    """Scores of a version over all clients that scored it."""

    version: int
    pooled: dict[str, float] = {}
    mean_of_clients: dict[str, float] = {}

    @property
    def metrics(self) -> dict[str, float]:
        """Both, by name."""
        return self.pooled | self.mean_of_clients


class Holders(_View):
    """The worst of what clients say of their live models."""

    error: float
    forward: float
    kept: float | None = None
    held: bool


class Clientside(_View):
    """What clients say in a round, or after the last one."""

    clients: tuple[ScoredClient, ...] = ()
    scores: VersionScores | None = None
    holders: Holders | None = None


NOTHING = Clientside()


def said_in(line: bytes) -> Clientside:
    """What clients say in one record; nothing where it has no such keys.

    Raises:
        ValidationError: if it has, and they are wrong.

    >>> line = b'{"clients": [{"client": "a", "scores": {"rows": 3, "metrics": {"f1": 0.5}}}]}'
    >>> said_in(line).clients[0].scores.metrics
    {'f1': 0.5}
    """
    if b'"scores"' not in line and b'"holders"' not in line:
        return NOTHING
    return Clientside.model_validate_json(line)
