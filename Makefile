# `make demo` and `make test` do all of their own set-up, on a machine that has Python 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format bench bench-transitions docs dashboards picture clean

demo: $(READY)
	$(BIN)/phasewatch demo $(ARGS)

test: $(READY) lint
	./tests/install_components
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-transitions: $(READY)
	$(BIN)/python -m tests.benchmarks.transitions $(ARGS)
	$(BIN)/python -m tests.benchmarks.online_transitions $(ARGS)

docs: $(READY)
	$(BIN)/python docs/tables.py

dashboards: $(READY)
	$(BIN)/python -m dashboards.build

picture: $(READY)
	$(BIN)/python docs/picture.py $(ARGS)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "phasewatch needs Python 3.11 or newer; name one with PYTHON=..., for example: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist
