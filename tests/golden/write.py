"""Write the golden records: ``python -m tests.golden.write``.

Their figures are those of the code that wrote them first. A change that should not move numbers
leaves them alone; one that changes the format of messages writes the bytes alone: ``--bytes``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track

from tests.golden.federations import FEDERATIONS, Bases, play
from tests.golden.figures import FORWARD, NARROW_FORWARD, bytes_moved, differences

FOLDER = Path(__file__).parent


def golden(name: str) -> dict[str, Any]:
    """What is stored of a federation."""
    stored: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return stored


def faults(name: str, found: dict[str, Any]) -> list[str]:
    """Every figure of a federation that is not the golden one; bytes aside."""
    narrow = "dtype" in FEDERATIONS[name][1].get("model", {})
    return differences(found, golden(name), scores=NARROW_FORWARD if narrow else FORWARD)


def main(*, bytes_only: bool) -> None:
    """Play every federation and write what comes out."""
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(Path(folder))
        for name in track(FEDERATIONS, "federations"):
            made = play(bases.recipe(name))
            made["bytes"] = bytes_moved(made["rounds"])
            if bytes_only:
                if moved := faults(name, made):
                    sys.exit("\n".join([f"{name}: more than bytes has changed", *moved]))
                made = golden(name) | {"bytes": made["bytes"]}
            text = json.dumps(made, indent=1, ensure_ascii=False)
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(bytes_only="--bytes" in sys.argv[1:])
