"""A global model that is no number any more ends its run: nothing can go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, isnan

from fedexlora.errors import DivergenceError
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.state import GlobalState, state_tensors

_WAY_OUT = "lower training.learning_rate, set training.max_grad_norm, or see federation.robust"


def check_finite(state: GlobalState, record: RoundRecord) -> None:
    """Refuse a version that is not finite, or has no finite score.

    Args:
        state: the version that a round led to.
        record: the round's.

    Raises:
        DivergenceError: naming the round, the tensors and scores, and the clients' losses.
    """
    where = f"round {record.round}"
    odd = [name for name, x in state_tensors(state).items() if not x.isfinite().all()]
    losses = [f"{client.client}: a training loss of {client.loss}" for client in record.clients]
    if odd:
        faults = [f"{name}: not finite" for name in odd]
        raise DivergenceError(f"{where}: the global model has diverged", [*faults, *losses])
    check_score(where, record.metrics, losses)


def check_score(where: str, metrics: Mapping[str, float], losses: Sequence[str]) -> None:
    """Refuse scores of a model whose outputs are no numbers.

    Args:
        where: the round.
        metrics: the scores; a perplexity may be infinite, as that of a finite loss.
        losses: what is known of the clients.

    Raises:
        DivergenceError: naming the scores.
    """
    odd = {
        name: value
        for name, value in metrics.items()
        if isnan(value) or (name == "loss" and not isfinite(value))
    }
    if odd:
        faults = [f"{name}: expected a finite number, found {value}" for name, value in odd.items()]
        raise DivergenceError(
            f"{where}: the global model has no score", [*faults, *losses, _WAY_OUT]
        )
