"""Generated texts beside their references, checked once and shared by all metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fedexlora.data.text_metrics.java import ptb_tokens
from fedexlora.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """Predictions ``(n,)`` and, for each, one or more references; numbers of them may differ.

    An empty prediction is a text like any other: a model may generate nothing. An empty reference
    is a fault of the data.

    Raises:
        DataError: there is no row, a row has no reference, or a reference is empty; all at once.
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        faults = _faults(self.predictions, self.references)
        if faults:
            raise DataError("the generated texts cannot be scored", faults)

    @cached_property
    def streams(self) -> list[list[str | None]]:
        """References as sacrebleu wants them: ``(most references, n)``, None where a row has fewer.

        None is "no reference"; an empty text would be one, of length zero.
        """
        most = max(map(len, self.references))
        return [[row[i] if i < len(row) else None for row in self.references] for i in range(most)]

    @cached_property
    def ptb(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """References and predictions by row as MS-COCO's metrics want them: in PTB tokens."""
        flat = [*self.predictions, *(text for row in self.references for text in row)]
        tokens = iter(ptb_tokens(flat))
        predictions = {i: [next(tokens)] for i in range(len(self.predictions))}
        references = {i: [next(tokens) for _ in row] for i, row in enumerate(self.references)}
        return references, predictions


def _faults(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
    if len(predictions) != len(references):
        return [f"expected references of {len(predictions)} rows, found {len(references)}"]
    if not predictions:
        return ["expected at least one row, found none"]
    faults = []
    for i, row in enumerate(references, 1):
        if isinstance(row, str):
            faults.append(f"row {i}: expected a list of references, found one text")
        elif not row:
            faults.append(f"row {i}: expected at least one reference, found none")
        else:
            faults += [
                f"row {i}: reference {j} is empty" for j, x in enumerate(row, 1) if not x.strip()
            ]
    return faults
