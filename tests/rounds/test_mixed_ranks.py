"""Clients of three ranks and scalings by every method that has its own way with them.

The oracle is dense, float64, and reads what clients sent from PEFT's own files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fedexlora.errors import RecipeError
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.model import DIFFERENCE
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run

LORA = {"r": 3, "lora_alpha": 6}
OWN = {"site-south": {"r": 2, "lora_alpha": 5}, "site-west": {"r": 1, "lora_alpha": 4}}
RANKS = {"site-north": 3, "site-south": 2, "site-west": 1}
SCALINGS = {"site-north": 2.0, "site-south": 2.5, "site-west": 4.0}
Sent = Mapping[str, tuple[np.ndarray, np.ndarray, float]]
"""By client: A, B and the weight, of one module."""


def parsed(document: dict, name: str, rounds: int, **options: object):
    made = document | {
        "method": {"name": name, **options},
        "lora": document["lora"] | LORA,
        "clients": {client: {"lora": lora} for client, lora in OWN.items()},
        "federation": document["federation"] | {"rounds": rounds},
    }
    return parse_recipe(made, name)


def two_rounds(document: dict, out: Path, name: str, **options: object) -> list[GlobalState]:
    """The versions after one round and after two."""
    states = []
    for rounds in (1, 2):
        run(parsed(document, name, rounds, **options), out, resume=rounds > 1, keep_updates=True)
        states.append(RunFolder(out).load().state)
    return states


def sent(out: Path, round_: int, module: str) -> Sent:
    found = {}
    for folder in sorted((out / "updates" / f"round-{round_:04d}").iterdir()):
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (
            tensors[f"base_model.model.{module}.lora_{x}.weight"].double().numpy() for x in "AB"
        )
        said = json.loads((folder / "client.json").read_text())
        assert a.shape[0] == RANKS[said["client"]]
        found[said["client"]] = a, b, said["weight"]
    return found


def mean(clients: Sent) -> np.ndarray:
    """``sum_i p_i s_i B_i A_i``."""
    whole = sum(weight for *_, weight in clients.values())
    return sum(w / whole * SCALINGS[c] * b @ a for c, (a, b, w) in clients.items())


def cut(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def energy_cut(matrix: np.ndarray, energy: float) -> np.ndarray:
    s = np.linalg.svd(matrix, compute_uv=False)
    return cut(matrix, int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), energy)) + 1)


def padded_means(clients: Sent, shares: Callable[[int], Mapping[str, float]]) -> dict:
    """By client, the scaled product of the first rows of what row-wise shares make."""
    columns, rows = [], []
    for j in range(3):
        q = shares(j)
        having = {c: x for c, x in clients.items() if RANKS[c] > j}
        rows.append(sum(q[c] * a[j] for c, (a, _, _) in having.items()))
        columns.append(sum(q[c] * SCALINGS[c] * b[:, j] for c, (_, b, _) in having.items()))
    a, b = np.stack(rows), np.stack(columns, axis=1)
    return {client: b[:, :rank] @ a[:rank] for client, rank in RANKS.items()}


def rbla(clients: Sent) -> dict:
    def shares(j: int) -> dict:
        having = {c: w for c, (_, _, w) in clients.items() if RANKS[c] > j}
        return {c: w / sum(having.values()) for c, w in having.items()}

    return padded_means(clients, shares)


def hetlora(clients: Sent) -> dict:
    norms = {c: SCALINGS[c] * np.linalg.norm(b @ a) for c, (a, b, _) in clients.items()}
    return padded_means(clients, lambda _: {c: x / sum(norms.values()) for c, x in norms.items()})


def flexlora(clients: Sent) -> dict:
    return {client: cut(mean(clients), rank) for client, rank in RANKS.items()}


def product(state: GlobalState, client: str, module: str) -> np.ndarray:
    pair = state.adapter_of(client)[module].to(state.total[module].value.dtype)
    return SCALINGS[client] * pair.product().numpy()


def total(state: GlobalState, module: str) -> np.ndarray:
    return 2.0 * state.total[module].dense().numpy()


def close(found: np.ndarray, truth: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - truth) <= 2e-6 * np.linalg.norm(truth))


@pytest.mark.parametrize(("name", "energy"), [("flora", 1.0), ("florist", 0.8)])
def test_stacked_updates_add_up_in_the_weight(document, tmp_path, name, energy):
    options = {} if name == "flora" else {"energy": energy}
    last = two_rounds(document, tmp_path / "run", name, **options)[-1]
    for module in last.adapter:
        updates = [mean(sent(tmp_path / "run", round_, module)) for round_ in (1, 2)]
        wanted = sum(x if energy == 1.0 else energy_cut(x, energy) for x in updates)
        assert close(total(last, module), wanted)
        for client in RANKS:
            assert not last.adapter_of(client)[module].B.any()
            assert last.adapter_of(client)[module].rank == RANKS[client]
        # Every client drew its own A, anew in every round.
        sent_a = [sent(tmp_path / "run", t, module)[c][0][0] for t in (1, 2) for c in RANKS]
        cosines = np.corrcoef(sent_a) - np.eye(6)
        assert np.abs(cosines).max() < 0.9


@pytest.mark.parametrize("rule", [flexlora, rbla, hetlora], ids=lambda rule: rule.__name__)
def test_adapters_of_every_rank_are_handed_out_and_the_weight_stays(document, tmp_path, rule):
    name, out = rule.__name__, tmp_path / "run"
    states = two_rounds(document, out, name)
    for round_, state in enumerate(states, 1):
        for module in state.adapter:
            wanted = rule(sent(out, round_, module))
            for client, truth in wanted.items():
                assert state.adapter_of(client)[module].rank == RANKS[client]
                assert close(product(state, client, module), truth)
            assert state.total[module].is_zero
    records = RunFolder(out).load().records
    assert all(not record.certificate.own for record in records)
    if name == "flexlora":
        assert all(record.certificate.held for record in records)
        assert all(record.certificate.truncated > 0 for record in records)


def test_such_clients_start_from_their_own_adapter_alone(document, tmp_path):
    recipe, out = parsed(document, "flexlora", 1), tmp_path / "run"
    run(recipe, out)
    state = RunFolder(out).load().state
    _, clients = prepare(recipe, Observer())
    for client in OWN:
        clients.as_client(client, state, lambda _: None)
        for name, module in clients.model.modules.items():
            assert module.side(DIFFERENCE) is None
            assert (module.factors().A == state.own[client][name].A).all()


def test_what_such_clients_measure_of_their_models_is_what_they_hold(document, tmp_path):
    scored = document | {"evaluation": {"where": "clients", "holdout": 0.25}}
    result = run(parsed(scored, "flexlora", 2), tmp_path / "run")
    for record in result.records:
        held = {client.client: client.holder for client in record.clients}
        assert held.keys() == RANKS.keys()
        assert all(found.bound <= found.allowed for found in held.values())


@pytest.mark.parametrize("name", ["rbla", "hetlora"])
def test_lower_ranks_start_from_the_first_rows_of_the_common_adapter(document, name):
    prepared, _ = prepare(parsed(document, name, 1), Observer())
    first = prepared.initial()
    for client, rank in list(RANKS.items())[1:]:
        for module, pair in first.own[client].items():
            assert (first.adapter[module].A[:rank] == pair.A).all()


def test_fedmomentum_makes_up_for_other_ranks_and_is_exact(document, tmp_path):
    out = tmp_path / "run"
    states = two_rounds(document, out, "fedmomentum", energy=1.0)
    for module in states[0].adapter:
        model, starts = 0.0, dict.fromkeys(RANKS, 0.0)
        for round_, state in enumerate(states, 1):
            clients = sent(out, round_, module)
            whole = sum(weight for *_, weight in clients.values())
            model = model + sum(
                w / whole * (SCALINGS[c] * b @ a - starts[c]) for c, (a, b, w) in clients.items()
            )
            assert close(total(state, module) + product(state, "site-north", module), model)
            for client, rank in RANKS.items():
                starts[client] = product(state, client, module)
                assert close(starts[client], cut(mean(clients), rank))


REFUSED = {
    "larger": (
        {"method": {"name": "rbla"}, "clients": {"site-west": {"lora": {"r": 5}}}},
        "rbla hands out the first directions of the common adapter; rank 5 in ",
    ),
    "pissa": (
        {"method": {"name": "flora"}, "lora": {"init_lora_weights": "pissa"}},
        "lora.init_lora_weights: flora has clients start from another adapter",
    ),
    "weighting": (
        {"method": {"name": "hetlora"}, "federation": {"weighting": "uniform"}},
        "federation.weighting: hetlora weighs clients itself",
    ),
    "robust": (
        {"method": {"name": "hetlora"}, "federation": {"robust": "geometric_median"}},
        "federation.robust: geometric_median changes weights, and hetlora weighs clients itself",
    ),
    "one rank": (
        {"method": {"name": "fedsvd"}, "clients": {"site-west": {"lora": {"r": 1}}}},
        'clients."site-west".lora: fedsvd needs one rank for all',
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_method_cannot_have_is_refused_by_key(document, tmp_path, kind):
    changes, message = REFUSED[kind]
    merged = {key: document.get(key, {}) | value for key, value in changes.items()}
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(document | merged, kind), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
