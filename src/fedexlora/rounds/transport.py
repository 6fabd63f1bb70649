"""How a round reaches clients, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedexlora.exchange.delivery import Delivery
from fedexlora.exchange.state import GlobalState

ClientProgress = Callable[[str, int, int], None]
"""Called with the client, steps done and steps in all."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back from one client."""

    client: str
    round: int
    """The round in which it was asked."""
    message: bytes | None = None
    """An encoded update, or the report of scores that was asked for; None if there is none."""
    failure: str = ""
    """Why there is none."""
    missed: str = ""
    """Why it could not come to the round's version from what it holds; it holds nothing now, has
    not trained, and takes a snapshot."""
    landed: bool = True
    """Whether the client is known to have come to the round's version, if it did not miss it."""
    seconds: float = 0.0
    """Local training."""
    rows: int | None = None
    """The training rows that the client had declared when it was asked, which its update must be
    of; None where the rows are the server's own."""
    resent: int = 0
    """Bytes that were sent to the client once more, because something on the way was lost."""


class Transport(Protocol):
    """What a round needs of the clients."""

    @property
    def clients(self) -> Sequence[str]:
        """The clients that can be asked now, in the order in which sums are taken."""

    @property
    def waiting(self) -> Mapping[str, int]:
        """Clients that still work for an earlier round, and that round; they are not asked."""

    @property
    def stateless(self) -> Collection[str]:
        """Clients that keep nothing from one request to the next, as simulated ones."""

    def ask(self, round_: int, client: str, delivery: Delivery) -> None:
        """Have a client come to a version and train from it.

        Args:
            round_: the round, from 1.
            client: the client.
            delivery: what brings it there.

        Raises:
            RunError: if the client cannot be reached.
            OSError: if the client cannot be reached.
        """

    def ask_scores(self, round_: int, client: str, delivery: Delivery) -> None:
        """Have a client come to a version and score it, without training; as :meth:`ask`.

        Its reply's message is a :class:`~fedexlora.exchange.scores.ScoreReport`.
        """

    def restore(self, client: str, state: GlobalState) -> None:
        """Told of a client that had come to a version before the server was interrupted.

        Args:
            client: the client, which is not asked again in this round.
            state: the version of the round.
        """

    def replies(
        self, round_: int, deadline: float | None, progress: ClientProgress
    ) -> Iterator[Reply]:
        """What comes back, as it comes: of those that were asked, and of those still waited for.

        A client whose reply says that it missed the version may be asked once more while this
        runs. After the deadline, in seconds, those that have not answered are reported as failed;
        what they send later comes in a later round, with the round in which they were asked.
        """
