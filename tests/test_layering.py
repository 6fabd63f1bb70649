"""Imports point one way, heavy libraries enter through one folder each, and imports stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fedexlora"

BELOW_EXCHANGE = {"texts", "errors", "algebra"}
ALLOWED = {
    "__init__": {"errors", "exchange", "rounds", "adapters"},
    "__main__": {"cli"},
    "texts": set(),
    "errors": {"texts"},
    "algebra": {"errors"},
    "exchange": BELOW_EXCHANGE,
    "methods": BELOW_EXCHANGE | {"exchange"},
    "peft_bridge": BELOW_EXCHANGE | {"exchange"},
    "data": BELOW_EXCHANGE | {"exchange"},
    "local": BELOW_EXCHANGE | {"exchange", "methods", "data", "peft_bridge"},
    "rounds": BELOW_EXCHANGE | {"exchange", "methods", "data", "peft_bridge", "local"},
    "adapters": BELOW_EXCHANGE | {"exchange", "methods", "data", "peft_bridge", "rounds"},
    "flower": BELOW_EXCHANGE | {"exchange", "methods", "data", "peft_bridge", "local", "rounds"},
    "cli": BELOW_EXCHANGE
    | {"exchange", "methods", "data", "peft_bridge", "local", "rounds"}
    | {"adapters", "report", "flower"},
    "report": BELOW_EXCHANGE | {"exchange"},
}
HOMES = {
    "accelerate": {"local", "rounds"},
    "peft": {"peft_bridge"},
    "transformers": {"peft_bridge", "data", "local", "rounds"},
    "datasets": {"data", "local", "rounds"},
    "flwr_datasets": {"data"},
    "sklearn": {"data"},
    "scipy": {"data", "report"},
    "huggingface_hub": {"peft_bridge", "adapters"},
    "sacrebleu": {"data"},
    "pycocoevalcap": {"data"},
    "math_verify": {"data"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "typer": {"cli"},
    "rich": {"cli"},
    "flwr": {"flower"},
}
PUBLIC_FLWR = {
    "flwr.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.serverapp.exception",
    "flwr.serverapp.strategy",
    "flwr.simulation",
}
FILES = sorted(SOURCE.rglob("*.py"))


def layer(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


def test_the_layers_are_the_ones_listed():
    assert len(FILES) > 30
    assert {layer(file) for file in FILES} == set(ALLOWED)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_one_way(file):
    own = layer(file)
    for module in imported(file):
        parts = module.split(".")
        if parts[0] == "fedexlora" and len(parts) > 1:
            assert parts[1] == own or parts[1] in ALLOWED[own], f"{own} may not import {module}"
        if parts[0] in HOMES:
            assert own in HOMES[parts[0]], f"{parts[0]} enters through {HOMES[parts[0]]} only"


def test_only_public_packages_of_flower_are_imported():
    found = {m for file in FILES for m in imported(file) if m.split(".")[0] == "flwr"}
    assert found <= PUBLIC_FLWR


@pytest.mark.parametrize("module", ["peft", "transformers", "datasets", "flwr", "torch"])
def test_importing_the_package_loads_nothing_heavy(module):
    code = f"import sys, fedexlora; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_algebra_exchange_and_methods_need_no_training_library():
    code = (
        "import sys, fedexlora.methods, fedexlora.exchange.delivery, fedexlora.exchange.update;"
        "found = {'peft', 'transformers', 'datasets', 'flwr'} & set(sys.modules);"
        "sys.exit(', '.join(found) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def loaded_with(file: Path) -> set[Path]:
    """The files of ours that are loaded when one is, but for the packages' own."""
    found, waiting = set(), [file]
    while waiting:
        file = waiting.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedexlora."):
                inner = SOURCE.joinpath(*str(node.module).split(".")[1:])
                waiting += [inner.with_suffix(".py"), inner / "__init__.py"]
    return found


def test_work_on_finished_things_needs_neither_the_loop_nor_local_training():
    loaded = {x for file in (SOURCE / "adapters").glob("*.py") for x in loaded_with(file)}
    assert SOURCE / "rounds" / "scoring.py" in loaded
    names = {str(file.relative_to(SOURCE)) for file in loaded}
    assert names & {"rounds/loop.py", "rounds/run.py", "rounds/preparation.py"} == set()
    assert {name for name in names if name.startswith("local/")} == {"local/own_keys.py"}


def test_the_process_of_a_flower_message_loads_no_training_library():
    """Flower starts one for every message, and counts those that need long to start as lost."""
    pytest.importorskip("flwr")
    code = (
        "import sys, fedexlora.flower.apps, fedexlora.flower.worker;"
        "found = {'torch', 'peft', 'transformers', 'datasets'} & set(sys.modules);"
        "sys.exit(', '.join(found) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_server_without_a_model_and_stored_adapters_need_no_training_library():
    """The base install has none of them."""
    pytest.importorskip("flwr")
    code = (
        "import sys, fedexlora.errors as errors;"
        "sys.modules |= dict.fromkeys(errors._TRAINING);"  # as if they were not installed
        "import fedexlora.flower.server, fedexlora.rounds.loop, fedexlora.cli.main;"
        "import fedexlora.adapters.aggregate, fedexlora.adapters.deviation;"
        "import fedexlora.adapters.export"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_tables_of_metrics_load_nothing_heavy():
    """What is missing for a metric is asked before a run, where nothing else is loaded yet."""
    code = (
        "import sys, fedexlora.data.answers.table as answers;"
        "import fedexlora.data.text_metrics.table as metrics;"
        "metrics.metric_faults(metrics.TEXT_METRICS), answers.rule_faults('math');"
        "heavy = {'torch', 'datasets', 'transformers', 'sacrebleu', 'sympy', 'numpy'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
