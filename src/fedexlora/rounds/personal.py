"""The adapters of a method that has one model a client, and none that is that of all."""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum
from typing import TYPE_CHECKING

from fedexlora.exchange.state import GlobalState
from fedexlora.local.memory import ClientMemory
from fedexlora.methods.rule import ClientRound, Rule, Trainables
from fedexlora.rounds.observer import Observer

if TYPE_CHECKING:  # they need transformers, which a server without a model has not
    from fedexlora.local.clients import LocalClients
    from fedexlora.rounds.scoring import Scoring


def personal_adapters(
    rule: Rule, state: GlobalState, memory: ClientMemory
) -> dict[str, Trainables]:
    """What every client with a memory would start the next round from: its model.

    Args:
        rule: of a method with personal models.
        state: the last version.
        memory: what clients remember.
    """
    if rule.client is None:
        return {}
    round_, found = state.version + 1, {}
    for client in memory.clients():
        received = Trainables(state.adapter_of(client), state.dense)
        remembered = memory.read(client, round_)
        at = ClientRound(client, round_, received, remembered.tensors, lambda: state.adapter)
        found[client] = rule.client.enter(at)
    return found


def mean_of_clients(
    scoring: Scoring,
    clients: LocalClients,
    held: Mapping[str, GlobalState],
    observer: Observer,
    memory: ClientMemory | None = None,
) -> dict[str, float]:
    """The plain mean of every client's scores on the server's rows, where there is no one model.

    Args:
        scoring: the rows, and how they are scored.
        clients: each scores in the model that it would train.
        held: by client, at least one, the version that it holds, with its own adapter.
        observer: told of progress.
        memory: what clients remember of the method; None where it remembers nothing.
    """
    each = [
        clients.as_client(client, state, lambda model: scoring.scores(model, observer), memory)
        for client, state in held.items()
    ]
    # A score that some client has not, as where its program failed, has no mean.
    names = set.intersection(*(set(scores) for scores in each))
    return {name: fsum(x[name] for x in each) / len(each) for name in sorted(names)}
