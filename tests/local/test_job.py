"""A job in the place of `Trainer`: one class of somebody's own, chosen in one place."""

from __future__ import annotations

import torch

from fedexlora.exchange.seeds import derive_seed
from fedexlora.local.job import JobResult
from fedexlora.rounds import preparation
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run


class Nudge:
    """Moves every trained parameter by a draw of its seed, and notes what it was asked."""

    def __init__(self, training, collator, rounds) -> None:
        self.made_for, self.asked, self.rehearsed = (training["schedule"], rounds), [], 0
        self.least_rows = 0

    def rehearse(self, model, rows) -> None:
        self.rehearsed += 1

    @torch.no_grad()
    def train(self, model, rows, *, seed, round_, on_step) -> JobResult:
        self.asked.append((round_, seed, len(rows)))
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
        on_step(1, 1)
        return JobResult(loss=round_ / len(rows), steps=1, rows=len(rows))


def test_a_run_whose_clients_do_another_job(document, tmp_path, monkeypatch):
    jobs = []

    def chosen(*given: object) -> Nudge:
        jobs.append(Nudge(*given))
        return jobs[0]

    monkeypatch.setattr(preparation, "local_job", chosen)
    document["federation"]["rounds"] = 2
    result = run(parse_recipe(document, "test"), tmp_path / "run")
    (job,) = jobs
    assert job.made_for == ("round", 2)
    assert job.rehearsed == 1
    taken = [(record.round, client) for record in result.records for client in record.clients]
    assert job.asked == [
        (round_, derive_seed(4, round_, client.client), client.num_examples)
        for round_, client in taken
    ]
    assert all(client.loss == round_ / client.num_examples for round_, client in taken)
    assert all(record.certificate.held for record in result.records)
