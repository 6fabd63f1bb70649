"""Versions that are scored by the clients, each on held-out rows of its own."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from math import fsum, inf, nan

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.data.holdout import hold_out
from fedexlora.errors import DataError, RecipeError, UpdateError
from fedexlora.exchange.records import ClientScores
from fedexlora.exchange.scores import ScoreReport, decode_report, taken_together
from fedexlora.exchange.update import decode_update
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.finish import Finish
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.personal import mean_of_clients
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import Recipe, parse_recipe
from fedexlora.rounds.run import run
from tests.models import adapted
from tests.rounds.conftest import files, recipe_document, records_without_times
from tests.rounds.forked import Moments, count, forked, quick
from tests.rounds.scripted import federation, random_update, replies, run_round

NAMES = {"loss", "accuracy", "f1"}
SCORES = ClientScores(rows=3, targets=3, metrics={"loss": 0.5, "accuracy": 1.0, "f1": 0.25})


def scored_document(bert, data_folder, **federation: object) -> dict:
    document = recipe_document(bert, data_folder)
    document["federation"] |= federation
    return document | {"evaluation": {"where": "clients", "holdout": 0.25}}


def parsed(bert, data_folder, **federation: object) -> Recipe:
    return parse_recipe(scored_document(bert, data_folder, **federation), "test")


@pytest.fixture(scope="module")
def scored(bert, data_folder, tmp_path_factory):
    """A run of three rounds that the clients have scored."""
    out = tmp_path_factory.mktemp("scored") / "run"
    run(parsed(bert, data_folder), out)
    return out


def test_every_version_has_the_scores_of_its_clients(scored):
    folder = RunFolder(scored)
    records, finish = folder.read_records(3), folder.read_finish()
    assert [record.scores.version for record in records] == [0, 1, 2]
    assert finish.scores.version == 3
    assert not any(record.metrics for record in records)
    for record in (*records, finish):
        each = [client.scores for client in record.clients]
        assert len(each) == record.scores.clients == 3
        rows = sum(x.rows for x in each)
        assert record.scores.rows == rows
        mean = sum(x.rows * x.metrics["accuracy"] for x in each) / rows
        assert record.scores.pooled["accuracy"] == pytest.approx(mean)
        assert record.scores.mean_of_clients == {"f1": fsum(x.metrics["f1"] for x in each) / 3}
    assert finish.bytes.down > 0
    assert finish.bytes.up == sum(x.uploaded_bytes for x in finish.clients)
    assert folder.read_header()["initial_metrics"] == {}


def test_scores_are_those_of_the_client_s_own_rows(bert, data_folder, scored):
    recipe = parsed(bert, data_folder)
    prepared, clients = prepare(recipe, Observer())
    store = RunFolder(scored).store
    for record in RunFolder(scored).read_records(3):
        state = store.state(record.round - 1)
        for client in record.clients:
            held = clients._held_out
            rows = held.rows.select(held.shares[client.client])
            wanted = clients.as_client(
                client.client,
                state,
                lambda model, rows=rows, held=held: prepared.task.evaluate(
                    model, rows, held.scorer.tokenizer, 64
                ),
            )
            assert client.scores.metrics == wanted
            assert client.scores.rows == len(rows)
            assert client.num_examples == len(clients.rows_of(client.client))


def test_no_row_is_both_trained_and_scored():
    shares = {"a": list(range(0, 40, 2)), "b": list(range(1, 31, 2)), "c": [90, 91]}
    found = hold_out(shares, 0.4, seed=3)
    for client, rows in shares.items():
        train, held = found.train[client], found.held_out[client]
        assert sorted([*train, *held]) == rows
        assert len(held) == round(0.4 * len(rows))
        assert list(train) == sorted(train)
        alone = hold_out({client: rows}, 0.4, seed=3)
        assert alone.held_out[client] == held  # whoever else there is
    assert hold_out(shares, 0.4, seed=4).held_out["a"] != found.held_out["a"]


def test_a_client_without_held_out_rows_is_named_before_round_1(bert, data_folder, tmp_path):
    document = scored_document(bert, data_folder)
    document["evaluation"]["holdout"] = 0.001
    with pytest.raises(DataError) as caught:
        run(parse_recipe(document, "test"), tmp_path / "run")
    said = str(caught.value)
    for client in ("site-north", "site-south", "site-west"):
        assert f"{client}: " in said
    assert "expected at least 501" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["clients", "none"])
def test_what_needs_the_server_s_rows_is_refused(bert, data_folder, where):
    document = recipe_document(bert, data_folder)
    document["evaluation"] = {
        "where": where,
        "sets": {"other": {"data": {"validation": "validation"}}},
        "mean": ["accuracy", "other.accuracy"],
    }
    with pytest.raises(RecipeError) as caught:
        parse_recipe(document, "test")
    assert "evaluation.sets: is scored on the server's rows" in str(caught.value)
    assert "evaluation.mean: is scored on the server's rows" in str(caught.value)


def test_nobody_scores_where_none_is_asked_for(bert, data_folder, tmp_path):
    document = recipe_document(bert, data_folder) | {"evaluation": {"where": "none"}}
    document["federation"]["rounds"] = 1
    result = run(parse_recipe(document, "test"), tmp_path / "run")
    assert result.records[0].scores is None
    assert result.records[0].metrics == {}
    assert RunFolder(tmp_path / "run").read_finish() is None


def test_versions_between_are_not_scored(bert, data_folder, tmp_path):
    document = scored_document(bert, data_folder)
    document["evaluation"]["every"] = 2
    run(parse_recipe(document, "test"), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert [bool(record.scores) for record in folder.read_records(3)] == [True, False, True]
    assert folder.read_finish().scores.version == 3


def test_a_run_that_is_continued_is_the_same_to_the_bit(bert, data_folder, scored, tmp_path):
    """Also one whose clients have come to its last version already."""
    run(parsed(bert, data_folder, rounds=2), tmp_path / "run")
    assert RunFolder(tmp_path / "run").read_finish().version == 2
    run(parsed(bert, data_folder), tmp_path / "run", resume=True)
    assert records_without_times(tmp_path / "run") == records_without_times(scored)
    assert files(tmp_path / "run" / "adapter") == files(scored / "adapter")
    assert scores_of(tmp_path / "run") == scores_of(scored)


def scores_of(folder) -> dict:
    return json.loads(RunFolder(folder).read_finish().model_dump_json(exclude={"seconds"}))


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_a_kill_after_the_last_round_loses_no_scores(bert, data_folder, tmp_path):
    made = prepare(parsed(bert, data_folder, rounds=1), Observer())

    def start(out, moments: Moments) -> None:
        quick(made, 0.0)
        moments.watch()
        run(made[0].recipe, out, resume=True)

    total = count(lambda m: start(tmp_path / "whole", m), Moments(), tmp_path)
    for moment in range(total - 6, total + 1):
        out = tmp_path / f"killed-{moment}"
        assert forked(lambda m=moment, o=out: start(o, Moments(m))) == -signal.SIGKILL
        assert forked(lambda o=out: start(o, Moments())) == 0
        assert scores_of(out) == scores_of(tmp_path / "whole")


def test_clients_with_adapters_of_their_own_are_scored_on_the_server_s_rows(
    bert, data_folder, tmp_path
):
    """Each in the model that it would train; where all hold one model, all scores are its."""
    document = recipe_document(bert, data_folder)
    document["federation"] |= {"rounds": 1}
    recipe = parse_recipe(document, "test")
    prepared, clients = prepare(recipe, Observer())
    result = run(recipe, tmp_path / "run")
    state = RunFolder(tmp_path / "run").store.state(1)
    everybody = dict.fromkeys(clients.num_examples, state)
    found = mean_of_clients(prepared.scoring, clients, everybody, Observer())
    assert found == pytest.approx(result.records[0].metrics)
    other = {name: Factors(0.1 + pair.A, 0.1 + pair.B) for name, pair in state.adapter.items()}
    apart = everybody | {"site-west": replace(state, adapter=other)}
    alone = mean_of_clients(prepared.scoring, clients, {"x": apart["site-west"]}, Observer())
    mixed = mean_of_clients(prepared.scoring, clients, apart, Observer())
    assert alone["loss"] != found["loss"]
    assert mixed["loss"] == pytest.approx((2 * found["loss"] + alone["loss"]) / 3)


HOSTILE = {
    "none": None,
    "a list": [1.0],
    "no rows": {"rows": 0, "targets": 3, "metrics": SCORES.metrics},
    "rows as text": {"rows": "3", "targets": 3, "metrics": SCORES.metrics},
    "a flag": {"rows": True, "targets": 3, "metrics": SCORES.metrics},
    "too many": {"rows": 2**60, "targets": 3, "metrics": SCORES.metrics},
    "nan": {"rows": 3, "targets": 3, "metrics": SCORES.metrics | {"loss": nan}},
    "a share above 1": {"rows": 3, "targets": 3, "metrics": SCORES.metrics | {"f1": 57.0}},
    "overflowing": {"rows": 3, "targets": 3, "metrics": SCORES.metrics | {"loss": 1e308}},
    "infinite": {"rows": 3, "targets": 3, "metrics": SCORES.metrics | {"f1": inf}},
    "a text": {"rows": 3, "targets": 3, "metrics": SCORES.metrics | {"f1": "\x1b[31m"}},
    "another name": {"rows": 3, "targets": 3, "metrics": SCORES.metrics | {"bleu": 1.0}},
    "one missing": {"rows": 3, "targets": 3, "metrics": {"loss": 0.5}},
    "more keys": SCORES.model_dump() | {"note": "x"},
}


class _Raw:
    def __init__(self, value: object) -> None:
        self._value = value

    def model_dump(self) -> object:
        return self._value


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_scores_are_a_fault_of_their_client(kind):
    model = AdaptedModel(adapted("roberta"))

    def script(round_, client, held):
        scores = _Raw(HOSTILE[kind]) if client == "site-b" else SCORES
        return replies(random_update(model, round_, client, scores=scores))

    parts, state = federation(model, "fedex", script, metrics=lambda version: NAMES)
    _, record = run_round(parts, state)
    assert [client.client for client in record.clients] == ["site-a", "site-c"]
    assert [out.client for out in record.left_out] == ["site-b"]
    assert record.left_out[0].reasons[0].startswith("scores: ")
    assert "\x1b" not in record.model_dump_json()
    assert record.scores.rows == 6


def test_scores_that_nobody_asked_for_are_refused():
    model = AdaptedModel(adapted("roberta"))
    message = random_update(model, 1, "site-a", scores=SCORES).encode()
    assert decode_update(message, model.spec, 1, "site-a", NAMES).scores == SCORES
    with pytest.raises(UpdateError, match="unexpected"):
        decode_update(message, model.spec, 1, "site-a")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"client": "b"}, "client: expected 'a', found 'b'"),
        ({"version": "9"}, "version: expected '1', found '9'"),
        ({"base": "other"}, "base: expected 'base', found 'other'"),
        ({"scores": _Raw(HOSTILE["nan"])}, "loss: expected a number of at most 1e+15, found nan"),
    ],
)
def test_a_report_is_held_against_what_was_agreed(changes, fault):
    expected = {"client": "a", "version": "1", "base": "base"}
    report = ScoreReport(**expected, scores=SCORES)
    assert decode_report(report.encode(), 1, NAMES, expected) == SCORES
    for message in (report.encode()[:-9], b"", b"x" * 5000):
        with pytest.raises(UpdateError):
            decode_report(message, 1, NAMES, expected)
    with pytest.raises(UpdateError) as caught:
        decode_report(
            ScoreReport(**(expected | {"scores": SCORES} | changes)).encode(), 1, NAMES, expected
        )
    assert fault in str(caught.value)


def test_figures_are_pooled_by_what_they_are_means_of():
    one = ClientScores(rows=1, targets=10, metrics={"loss": 2.0, "accuracy": 1.0, "f1": 1.0})
    other = ClientScores(rows=3, targets=30, metrics={"loss": 1.0, "accuracy": 0.0, "f1": 0.5})
    found = taken_together(4, [one, other])
    assert found.pooled == {"loss": 1.25, "accuracy": 0.25}
    assert found.mean_of_clients == {"f1": 0.75}
    assert (found.version, found.clients, found.rows, found.targets) == (4, 2, 4, 40)


def test_the_loss_of_a_language_model_is_pooled_by_targets(gpt2, data_folder, tmp_path):
    """It is that of all held-out rows at once."""
    document = scored_document(gpt2, data_folder, rounds=1)
    document["task"] = {"kind": "causal-lm", "text": "text", "max_length": 16}
    document["lora"] = {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"]}
    recipe = parse_recipe(document, "test")
    prepared, clients = prepare(recipe, Observer())
    held = clients._held_out
    every = [row for client in held.shares for row in held.shares[client]]
    rows = held.rows.select(every)
    model = clients.model.peft_model
    wanted = prepared.task.evaluate(model, rows, held.scorer.tokenizer, 64)
    run(recipe, tmp_path / "run")
    found = RunFolder(tmp_path / "run").read_records(1)[0].scores
    assert found.pooled["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert set(found.mean_of_clients) == {"perplexity"}
    assert found.targets > found.rows == len(every)


def test_a_client_that_does_not_answer_at_the_end_is_named():
    model = AdaptedModel(adapted("roberta"))
    parts, state = federation(model, "fedex", metrics=lambda version: ())
    state, _ = run_round(parts, state)
    transport = parts.transport
    asked = []

    def ask_scores(round_, client, delivery):
        asked.append((round_, client))
        if client == "site-b":
            raise OSError("gone")

    transport.ask_scores = ask_scores
    holdings = transport.holdings
    finish = Finish(transport, state, holdings, model.base_fingerprint, NAMES)
    found = finish.record(["site-a", "site-b"])
    assert asked == [(2, "site-a"), (2, "site-b")]
    assert {x.client: x.reasons for x in found.left_out} == {
        "site-a": ("it did not answer",),
        "site-b": ("gone",),
    }
    assert found.scores is None
    assert torch.is_tensor(next(iter(state.adapter.values())).A)
