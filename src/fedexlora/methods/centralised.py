"""Centralised LoRA: the rows of all clients in one place, which nothing federated has to reach.

No method but the reference of Singhal et al., ACL 2025, arXiv:2410.09432, Tables 1-3. There is one
client, ``centralised``, with the rows of every client that ``[federation]`` admits, and it trains
by the same recipe: in every round its epochs over all rows, from the adapter that it left the round
before. So it reads as many rows a round as all clients of a federation together, in sequence, and
its scores stand beside theirs round by round. What follows from that, and is to be said with it:

- Where a part of the clients is drawn for a round, the federation reads fewer rows than this.
- A limit of steps (``training.max_steps``) is one of a client: the federation takes it K times.
- Every round begins a new optimizer, and a new schedule too unless ``training.schedule = "run"``:
  as a client's does. One round of all the epochs is training without that.

What concerns several clients has no part in it: how many take part in a round, how many must, and
what each counts. It needs all rows in one process; a deployment is refused.
"""

from __future__ import annotations

from fedexlora.algebra import assignment
from fedexlora.methods.method import Method, Options
from fedexlora.methods.next_adapter import next_adapter
from fedexlora.methods.rule import Rule


def _rule(options: Options) -> Rule:
    del options
    server = next_adapter(assignment.mean, assignment.keep)
    return Rule(server, exact=True, certified=True, pooled=True)


CENTRALISED = Method(
    name="centralised",
    title="centralised LoRA (reference)",
    paper="arXiv:2410.09432 (ACL 2025)",
    sends="nothing leaves: one client has all rows; its adapter is counted both ways",
    keeps="nothing is left over: there is nothing to average",
    certified_against="the ideal, that is the adapter of the one client",
    stored="none",
    rule=_rule,
)
