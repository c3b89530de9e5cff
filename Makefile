# `make repro` and `make test` do all the set-up: a virtual environment from requirements.lock, with Python 3.11 or 3.12.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
# What test-gpu and record run with: a GPU host may bring its own torch.
PYTHON ?= $(BIN)/python

.PHONY: help env repro test test-gpu lint format types contracts params report record lock clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

env: $(VENV)/installed ## make .venv from requirements.lock

$(VENV)/installed: requirements.lock pyproject.toml
	@command -v git >/dev/null || { echo "error: git is not here: apt-get install git" >&2; exit 1; }
	@for python in python3.12 python3.11 python3; do \
	  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || continue; \
	  here=$$python; \
	  if $$python -c 'import ensurepip, venv' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$here" ]; then echo "error: needs Python 3.11 or 3.12: apt-get install python3 python3-venv" >&2; exit 1; fi; \
	if [ -z "$$found" ]; then \
	  echo "error: $$here cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "$(VENV) with $$($$found --version)"; $$found -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

repro: env ## run the pipeline: whatever changed since it ran last
	$(RUN) dvc repro

test: env ## run the tests that need no GPU
	$(RUN) python -m pytest -n 2 --dist loadgroup -m "not gpu"

test-gpu: ## run the tests that need a GPU, with PYTHON
	$(PYTHON) -m pytest -m gpu

lint: env ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: env ## write the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: env ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

contracts: env ## check which part imports which
	$(RUN) lint-imports

params: env ## write params.yaml from conf/
	$(RUN) python -m stages.compose

report: env ## write the report anew from the Parquet that is there
	$(RUN) dvc repro --single-item --force report

record: ## keep this host's measurements under reports/recorded/
	$(PYTHON) -m stages.record

lock: ## resolve pyproject.toml anew into requirements.lock
	bash setup/lock.sh

clean: ## remove what can be made again, but not data/ nor DVC's cache
	rm -rf $(VENV) outputs dvc_plots .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find engine kernels stages tests -name __pycache__ -prune -exec rm -rf {} +
