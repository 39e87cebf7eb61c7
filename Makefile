# The door for people: `make` lists what there is. Needs Python 3.11 or newer and make; the rest it installs into .venv.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

# The first interpreter that runs and is new enough; 3.11 first because the pins in constraints.txt are tested on it.
# Another one: make env PYTHON=/path/to/python
PYTHON ?= $(shell for candidate in python3.11 python3 python3.12 python3.13 python; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$candidate; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test-only, and without its dependencies: it would pull a torch of its own choice.
TORCHVISION := torchvision==0.28.0
# Two workers by default, each with two threads: what a small machine has.
JOBS ?= 2
PYTEST_ARGS ?=
export OMP_NUM_THREADS ?= 2

.PHONY: help env demo test check golden notebooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## create .venv with fxq (editable) and everything the demo and the tests need

$(STAMP): pyproject.toml constraints.txt Makefile
	@if [ -z "$(PYTHON)" ]; then \
		echo "fxq needs Python 3.11 or newer and found none; name one: make env PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fxq needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing fxq and what its tests need into $(VENV): a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps '$(TORCHVISION)'
	@touch $@

demo: $(STAMP) ## train a small residual network, quantize it, and show what happened
	$(BIN)/python -m fxq.demo

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## the whole suite: check, then pytest (PYTEST_ARGS='-k name' for a part of it)
	$(BIN)/pytest -n $(JOBS) $(PYTEST_ARGS)

golden: $(STAMP) ## rewrite tests/golden from what the code prints now; read the diff before committing it
	$(BIN)/pytest -n $(JOBS) --golden-update $(PYTEST_ARGS)

notebooks: $(STAMP) ## run the notebooks and keep their outputs
	$(BIN)/python tests/support/execute_notebooks.py

clean: ## remove .venv, caches and build output
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-out
