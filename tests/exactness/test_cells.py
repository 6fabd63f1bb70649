"""Every base precision, layer, mix of ranks and next adapter: five rounds of real training."""

from __future__ import annotations

import pytest

from tests.exactness.cells import Cell, autocast_cells, cells, core, method_cells, play

CORE = core()
REST = [cell for cell in (*cells(), *autocast_cells()) if cell not in CORE]


def check(cell: Cell) -> None:
    outcome = play(cell)
    assert outcome.share <= 1.0, "the model that the server holds"
    assert outcome.own <= 1e-6 or "fold" in outcome.placements
    assert outcome.own <= 2e-6, "the models that clients with adapters of their own hold"
    assert outcome.output <= 1e-5
    assert all(record.certificate.held for record in outcome.records)
    certificate = outcome.records[-1].certificate
    assert certificate.worst_forward <= (1e-2 if cell.autocast else 2e-6)
    assert certificate.kept is None or abs(certificate.kept - 1.0) <= 1e-2
    if cell.autocast:
        assert outcome.placements == "side"
    if cell.next_adapter == "keep":
        assert len(outcome.records[-1].certificate.own) == 3
    if cell.method != "fedex":
        return
    assert certificate.kept is not None
    if cell.ranks != "mixed":
        assert outcome.averaging > 1e-3, "the clients must differ for this to prove anything"
    if cell.next_adapter == "mean" and cell.ranks != "mixed":
        stated = outcome.records[-1].deviation
        assert stated == pytest.approx(outcome.averaging, rel=1e-4)


@pytest.mark.exactness
@pytest.mark.parametrize("cell", CORE, ids=str)
def test_what_is_applied_is_the_float64_ideal(cell):
    check(cell)


@pytest.mark.exactness
@pytest.mark.parametrize("cell", method_cells(), ids=str)
def test_every_other_method_applies_what_it_is_held_to(cell):
    check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", REST, ids=str)
def test_what_is_applied_is_the_float64_ideal_everywhere(cell):
    check(cell)


@pytest.mark.exactness
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "nf4"])
def test_folding_into_a_narrow_weight_loses_what_the_record_says(dtype):
    fold = play(Cell("roberta", dtype, "equal", "mean", placement="fold"))
    beside = play(Cell("roberta", dtype, "equal", "mean"))
    assert not fold.records[-1].certificate.held
    assert fold.records[-1].certificate.error > 1e-4
    assert fold.error == pytest.approx(max(m.error for m in fold.records[-1].modules), rel=1e-3)
    assert beside.error <= 1e-6


@pytest.mark.exactness
def test_folding_under_autocast_loses_what_the_record_says():
    """Held in the float32 weights, and lost in the products: the forward error says so."""
    fold = play(Cell("llama-gqa", "float32", "equal", "mean", placement="fold", autocast=True))
    beside = play(Cell("llama-gqa", "float32", "equal", "mean", autocast=True))
    assert fold.records[-1].certificate.held
    assert fold.records[-1].certificate.forward > 1.5 * beside.records[-1].certificate.forward
