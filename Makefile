# Lumina's tasks. `make` alone lists them.

# The first of these that is Python 3.11 to 3.13 makes .venv; to choose one: make setup PYTHON=/path/to/python3.12
PYTHON ?= python3 python3.13 python3.12 python3.11
ARGS ?=
PYTEST_ARGS ?= -q -n 2

VENV := .venv
BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip --disable-pip-version-check install --quiet --constraint requirements.lock
LOCKED := pyproject.toml requirements.lock

.PHONY: help setup setup-dev train test parity check mutants faults format bench plans lock hooks clean
.NOTPARALLEL:

help: ## list these tasks
	@echo "Usage: make TASK [ARGS='more flags for the command']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.core ## make .venv with what training needs

setup-dev: $(VENV)/.dev ## make .venv with what tests and checks need as well

train: $(VENV)/.core ## train the debug model: three minutes on two CPU cores
	$(BIN) -m lumina_jax.train --config configs/debug.py --workdir runs/debug $(ARGS)

test: $(VENV)/.dev ## run the tests; ARGS=tests/lumina runs some of them
	$(BIN) -m pytest $(PYTEST_ARGS) $(ARGS)

parity: $(VENV)/.dev ## hold JAX and PyTorch against each other, and write docs/parity.md
	$(BIN) -m parity_tests.lanes $(ARGS)

check: $(VENV)/.dev ## lint (with security rules), formatting, types, shell scripts
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy
	$(VENV)/bin/shellcheck launch/*.sh

mutants: $(VENV)/.dev ## plant known mistakes and see the tests catch each; ARGS='tied head' plants some
	$(BIN) tests/mutants.py $(if $(ARGS),'$(ARGS)')

faults: $(VENV)/.dev ## kill, damage, fill and hang a tiny run, and see that nothing is lost; ARGS=kill tries some
	$(BIN) -m tests.faults.matrix $(ARGS)

format: $(VENV)/.dev ## format the code, and sort its imports
	$(BIN) -m ruff check --select I --fix --quiet .
	$(BIN) -m ruff format .

bench: $(VENV)/.core ## time the train step; prints JSON
	$(BIN) benchmarks/train_step.py $(ARGS)

plans: $(VENV)/.core build/libtpu/.made ## compile every preset for its TPUs, and write docs/plans.md; ARGS=b14 makes some anew
	PYTHONPATH=build/libtpu $(BIN) benchmarks/plans.py $(ARGS)

lock: build/uv/bin/uv ## update requirements.lock to fit pyproject.toml; ARGS=--upgrade takes newer versions
	build/uv/bin/uv pip compile pyproject.toml --output-file requirements.lock --quiet $(ARGS) \
	    --universal --python-version 3.11 --extra dev --extra torch --extra gpu --extra tpu --no-annotate \
	    --custom-compile-command 'make lock   (exact versions; no hashes, as a CPU build of the same torch may serve)'

hooks: $(VENV)/.dev ## check each commit as it is made (pre-commit)
	$(BIN) -m pre_commit install

clean: ## remove caches and builds; keeps .venv and runs/
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written after its step has finished, so that an interrupted one is done again.
$(VENV)/.made:
	@for candidate in $(BIN) $(PYTHON); do \
	    $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null || continue; \
	    if [ $$candidate = $(BIN) ]; then \
	        $(BIN) -m pip --version > /dev/null 2>&1 || continue; \
	        echo "Using the $(VENV) that is here, $$($(BIN) --version)."; \
	    else \
	        echo "Making $(VENV) with $$($$candidate --version) ($$candidate)."; \
	        $$candidate -m venv $(VENV) && $(BIN) -m pip --version > /dev/null || exit 1; \
	    fi; \
	    touch $@; exit 0; \
	done; \
	echo "error: Lumina needs Python 3.11, 3.12 or 3.13, and none of these is one: $(PYTHON)." \
	    "Name one: make setup PYTHON=/path/to/python3.12" >&2; exit 1

$(VENV)/.core: $(LOCKED) | $(VENV)/.made
	@echo "Installing what training needs into $(VENV): about a minute and 800 MB, the first time."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(LOCKED) | $(VENV)/.made
	@echo "Installing what training, tests and checks need into $(VENV): a few minutes and 2 GB, the first time."
	@$(PIP) --editable '.[dev,torch]'
	@touch $(VENV)/.core $@

# Beside $(VENV), where JAX would look for a TPU whenever it starts.
build/libtpu/.made: requirements.lock | $(VENV)/.made
	$(PIP) --target build/libtpu libtpu --no-deps
	@touch $@

build/uv/bin/uv: | $(VENV)/.made
	$(BIN) -m venv build/uv
	build/uv/bin/python -m pip --disable-pip-version-check install --quiet uv
