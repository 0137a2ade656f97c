# Everything runs from .venv. Each target first installs what it needs, stage by stage, and only
# once: a stage runs again when the pins or the extras have changed, or when it did not end.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.setup-
INSTALL := @tools/setup/install.sh $(VENV)

.PHONY: help setup quickstart test test-compat test-torch lint bench bench-steps gpu
.DEFAULT_GOAL := help

help:
	@echo "make quickstart [ARGS=...]     train, evaluate and compare small models (ARGS=--help)"
	@echo "make test                      run the tests"
	@echo "make test-compat [ARGS=...]    test every supported megatron-core (ARGS=0.16.1 for one)"
	@echo "make test-torch [ARGS=...]     test the library on older versions of torch, 7 GB each (ARGS=2.8.0)"
	@echo "make lint                      check style and types"
	@echo "make bench [ARGS=...]          time the loss beside Megatron's and others (ARGS=--help)"
	@echo "make bench-steps [ARGS=...]    time training steps with and without the hook (ARGS=--help)"
	@echo "make gpu [ARGS=...]            prove and time it on this machine's GPU, in 8 minutes (ARGS=--help)"
	@echo "make setup                     only install what all of these need, into $(VENV)"

setup: $(READY)test $(READY)lint

$(READY)python: pyproject.toml constraints.txt
	$(INSTALL) python

$(READY)torch: $(READY)python
	$(INSTALL) torch

$(READY)quickstart: $(READY)torch
	$(INSTALL) quickstart

$(READY)test $(READY)lint: $(READY)quickstart
	$(INSTALL) $(@:$(READY)%=%)

quickstart: $(READY)quickstart
	@$(BIN)/python examples/quickstart.py $(ARGS)

test: $(READY)test
	$(BIN)/python -m pytest

test-compat: $(READY)test
	@$(BIN)/python tests/support/run_every_version.py $(ARGS)

test-torch: $(READY)test
	@$(BIN)/python tests/support/run_every_torch.py $(ARGS)

lint: $(READY)lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)quickstart
	@$(BIN)/python tools/bench/run.py $(ARGS)
	@$(if $(filter -h --help,$(ARGS)),,$(BIN)/python tools/bench/plot.py)

bench-steps: $(READY)quickstart
	@$(BIN)/python tools/bench/train_step.py $(ARGS)

gpu: $(READY)test
	@$(BIN)/python tools/bench/gpu.py $(ARGS)
