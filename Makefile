# Every target sets up what it needs: Python 3.11 or newer and a package index are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread each: the models are too small to gain from more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: quickstart quickstart-compare test slow exactness results results-smoke bench-server check lint types format clean

quickstart: $(VENV)/.quickstart  ## Federated fine-tuning of a real model on real text, in minutes
	$(BIN)/python examples/stdlib_docstrings.py data/docstrings
	$(BIN)/fedexlora run recipes/quickstart.toml --out runs/quickstart --keep-updates --resume

quickstart-compare: $(VENV)/.quickstart  ## FedEx-LoRA, plain averaging and centralised training, three seeds
	$(BIN)/python examples/stdlib_docstrings.py data/docstrings
	$(BIN)/fedexlora compare recipes/quickstart.toml --methods fedit,fedex,centralised --seeds 0,1,2 --jobs 2 --out runs/quickstart-compare --resume
	$(BIN)/fedexlora report runs/quickstart-compare --out runs/quickstart-compare/report.html

test: $(VENV)/.dev  ## All tests that need no network, no GPU and little time; exactness included
	$(PYTEST) --numprocesses 0 -rs -m deployment tests/flower/test_deploy.py
	$(PYTEST) -m "exactness or not (slow or network or gpu or deployment)"

slow: $(VENV)/.dev  ## Servers and nodes that are killed or cut off; models trained on real data sets
	$(PYTEST) --numprocesses 0 -rs -m slow tests/flower
	$(PYTEST) -m "slow and not (network or gpu)" --ignore tests/flower

exactness: $(VENV)/.dev  ## Measure the tables of docs/exactness.md again
	$(BIN)/python -m tests.exactness.table

# METEOR, ROUGE-L and CIDEr are computed by Java programs of the extra java-metrics.
results: $(VENV)/.java-metrics  ## The tables of docs/results.md, from nothing: one to two hours
	$(BIN)/python -m benchmarks.results

results-smoke: $(VENV)/.java-metrics  ## One row of each of those tables, in minutes
	$(BIN)/python -m benchmarks.results --smoke

bench-server: $(VENV)/.dev  ## A server's work on a round beside the official recipe: two minutes
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/server.py --json runs/bench-server.json

check: lint types test  ## Everything that CI checks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV); this takes some minutes the first time."
	$(PIP_INSTALL) --editable '.[quickstart]'
	@touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	$(PIP_INSTALL) --editable '.[quickstart,quantization,flower,simulation,dev]'
	@touch $@

$(VENV)/.java-metrics: $(VENV)/.dev
	$(PIP_INSTALL) --editable '.[quickstart,java-metrics]'
	@touch $@
