# Everything runs from .venv, which `setup` makes; it is quick when nothing has changed.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

.PHONY: help setup quickstart test test-compat lint bench bench-steps
.DEFAULT_GOAL := help

help:
	@echo "make setup                     find a Python >= 3.12, install into $(VENV) (about 6 GB)"
	@echo "make quickstart [ARGS=...]     train, evaluate and compare small models (ARGS=--help)"
	@echo "make test                      run the tests"
	@echo "make test-compat [ARGS=...]    test every supported megatron-core (ARGS=0.16.1 for one)"
	@echo "make lint                      check style and types"
	@echo "make bench [ARGS=...]          time the loss beside Megatron's and others (ARGS=--help)"
	@echo "make bench-steps [ARGS=...]    time training steps with and without the hook (ARGS=--help)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import sys, pip; assert sys.version_info >= (3, 12)' 2>/dev/null; then \
		python=$$(tools/find_python.sh) && echo "Making $(VENV) with $$python" && \
		"$$python" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[train,dev]' -c constraints.txt
	@touch $@

quickstart: setup
	@$(BIN)/python examples/quickstart.py $(ARGS)

test: setup
	$(BIN)/python -m pytest

test-compat: setup
	@$(BIN)/python tests/megatron/run_every_version.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@$(BIN)/python tools/bench/run.py $(ARGS)
	@$(if $(filter -h --help,$(ARGS)),,$(BIN)/python tools/bench/plot.py)

bench-steps: setup
	@$(BIN)/python tools/bench/train_step.py $(ARGS)
