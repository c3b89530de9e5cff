# `make repro` and `make test` do all the set-up: a virtual environment from requirements.lock, with Python 3.11 or 3.12.
# `make setup` also looks at the machine: system packages, CUDA toolkit, torch's build for the driver.
SHELL := /bin/bash
AFS_VENV ?= .venv
VENV := $(AFS_VENV)
LOCK := requirements.lock
PYTHONS ?= python3.12 python3.11 python3
# An index of torch's builds, as https://download.pytorch.org/whl/cpu; empty: torch comes from where the rest does.
TORCH_INDEX_URL ?=
TORCH_BUILD := $(filter cpu cu%,$(notdir $(patsubst %/,%,$(TORCH_INDEX_URL))))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN := PATH="$(abspath $(BIN)):$$PATH"
# What test-gpu and record run with: a GPU host may bring its own torch.
PYTHON ?= $(BIN)/python
# What fetch-olmo stages and run-olmo runs: a file of conf/model/.
OLMO ?= olmo2_1b
ARGS ?= --prompt "The capital of France is"
# Columns that `dvc exp show` leaves out: sums of files, what a GPU's or a model's name already says, and the queue's.
HIDDEN ?= .*/|State|Executor|checkpoint\.|gpu\.(?!name)|model\.(?!name|weights)

.PHONY: help env setup setup-vast download-assets fetch-olmo run-olmo
.PHONY: repro experiments test test-slow test-gpu mutants lint format types contracts params report record pack lock clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 17

env: $(VENV)/installed ## make .venv from requirements.lock

# torch's builds for other CUDA versions want other CUDA packages than the lock pins: torch first, then the pins.
$(VENV)/installed: $(LOCK) pyproject.toml
	@command -v git >/dev/null || { echo "error: git is not here: apt-get install git" >&2; exit 1; }
	@for python in $(PYTHONS); do \
	  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || continue; \
	  here=$$python; \
	  if $$python -c 'import ensurepip, venv' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$here" ]; then echo "error: needs Python 3.11 or 3.12: apt-get install python3 python3-venv" >&2; exit 1; fi; \
	if [ -z "$$found" ]; then \
	  echo "error: $$here cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "$(VENV) with $$($$found --version)"; $$found -m venv --clear $(VENV)
ifeq ($(TORCH_INDEX_URL),)
	$(PIP) -r $(LOCK)
else
	$(PIP) --extra-index-url "$(TORCH_INDEX_URL)" "$$(grep '^torch==' $(LOCK))$(TORCH_BUILD:%=+%)"
	$(PIP) -r <(grep -v '^torch==' $(LOCK))
endif
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

setup: ## make this machine ready: system packages, CUDA toolkit, .venv with torch's build for the driver
	bash setup/bootstrap.sh

setup-vast: ## the same in a managed container (Vast.AI, RunPod): only .venv
	SKIP_SYSTEM_PACKAGES=1 SKIP_CUDA_TOOLKIT=1 bash setup/bootstrap.sh

download-assets: env ## stage the checkpoint that params.yaml names
	$(RUN) dvc repro download

fetch-olmo: env ## stage OLMO=olmo2_1b from the hub; FETCH_OLMO_UPDATE=1 fetches it anew
	$(RUN) python -m stages.download model=$(OLMO) model.force=$(if $(filter 1,$(FETCH_OLMO_UPDATE)),true,false)

run-olmo: env ## generate with what fetch-olmo staged, ARGS as of `afs generate`
	$(RUN) afs generate --model outputs/download/data/hf/hf_snapshot/$(OLMO) $(ARGS)

repro: env ## run the pipeline: whatever changed since it ran last
	$(RUN) dvc repro

experiments: env ## list this commit's experiments: the headlines and parameters that differ between them
	$(RUN) dvc exp show --only-changed --drop '$(HIDDEN)'

test: env ## run the tests that need no GPU, but for slow ones
	$(RUN) python -m pytest -n 3 --dist loadgroup -m "not gpu and not slow"

test-slow: env ## run those that take tens of seconds each: large simulations, soaks, DVC end to end
	$(RUN) python -m pytest -n 2 --dist loadgroup -m "slow and not gpu"

test-gpu: ## run the tests that need a GPU, with PYTHON
	$(PYTHON) -m pytest -m gpu

mutants: env ## put each fault of tests/mutants.toml into a copy of the code: do the tests notice?
	$(RUN) python -m tests.mutants

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

record: ## keep this host's measurements under reports/recorded/; WEEKS="w06 w08": those alone, FORCE="why": despite noise
	$(PYTHON) -m stages.record $(if $(WEEKS),--weeks $(WEEKS)) $(if $(FORCE),--force "$(FORCE)")

pack: env ## one file for a GPU host without network or git: PACK="'model=olmo2_7b model.weights=random' --arch sm_90a"
	$(RUN) python -m stages.pack $(PACK)

lock: ## resolve pyproject.toml anew into requirements.lock
	bash setup/lock.sh

clean: ## remove what can be made again, but not data/ nor DVC's cache
	rm -rf $(VENV) outputs dvc_plots .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find engine kernels stages tests -name __pycache__ -prune -exec rm -rf {} +
