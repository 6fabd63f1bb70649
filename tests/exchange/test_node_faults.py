"""A node's faults are codes; the sentences are the server's own."""

from __future__ import annotations

import pytest

from fedexlora.exchange.node_faults import FAULT_TEXTS, NodeFault, fault_text


def test_every_code_has_a_sentence_of_its_own():
    assert set(FAULT_TEXTS) == set(NodeFault)
    assert len(set(FAULT_TEXTS.values())) == len(NodeFault)
    for code in NodeFault:
        assert fault_text(str(code)) == FAULT_TEXTS[code]


@pytest.mark.parametrize("said", ["", "a\x1b[2J secret", None, 7, ["internal"], {"internal": 1}])
def test_nothing_of_another_text_is_repeated(said):
    assert fault_text(said) == "it gave a reason that is none of the agreed codes"
