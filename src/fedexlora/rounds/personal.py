"""The adapters of a method that has one model a client, and none that is that of all."""

from __future__ import annotations

from fedexlora.exchange.state import GlobalState
from fedexlora.local.memory import ClientMemory
from fedexlora.methods.rule import ClientRound, Rule, Trainables


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
