# `make demo` and `make test` need nothing but Python >= 3.11 and a C++17 compiler: each makes
# .venv when it is missing, installs what it needs when that is stale, and runs.
# The other targets are the checks that .ci/run calls one by one.

SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2
EVERY ?= 1
BACKENDS ?= jax torch tensorflow
# What imports keras has a process for each backend, and no part in the other runs.
KERAS := $(wildcard src/chainrule/keras_*.py src/chainrule/bridges/keras_*.py)

# Build environments obey the same pins: older pips read the first name there, newer ones the second.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

INPUTS := pyproject.toml constraints.txt $(wildcard CMakeLists.txt native/*.cc native/*.hpp native/include/chainrule/*.hpp)
install = $(BIN)/python -m pip install --quiet --editable ".[$(1)]"

.DEFAULT_GOAL := help
.PHONY: help demo test coverage dev lint types doctest slow long golden everywhere versions clients keras notebooks docs a11y sanitize bench dist

help:
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## three mechanisms at work, and every chain beside optax.adamw; table and demo.png
	$(BIN)/chainrule demo

# Doctests of what needs a trainer are left out where there is none: `make dev` installs them.
test: $(VENV)/.test  ## tests and doctests, without the slow ones
	$(PYTEST) --doctest-modules --doctest-ignore-import-errors src tests $(KERAS:%=--ignore=%) \
	  -m "not slow and not clients and not keras" -n $(WORKERS) $(COVERAGE)

coverage:  ## the same, and which lines they run (a sixth slower)
	$(MAKE) test COVERAGE="--cov --cov-report=term"

dev: $(VENV)/.dev  ## install everything that the targets below need

lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## pyright
	$(BIN)/pyright --threads $(WORKERS) --pythonpath $(BIN)/python

doctest: $(VENV)/.dev  ## the docstrings' examples alone
	$(PYTEST) --doctest-modules src $(KERAS:%=--ignore=%)

slow: $(VENV)/.dev  ## the tests that `make test` leaves out
	$(PYTEST) -m "slow and not long" -n $(WORKERS)

long: $(VENV)/.dev  ## those for which `.ci/run` has no time: every chain on every mesh, another thousand compositions, half of optax exported
	$(PYTEST) -m long -n $(WORKERS)

golden: $(VENV)/.dev  ## the recordings again, with the XLA flags that users have (EVERY=3: one in three)
	XLA_FLAGS= $(PYTEST) tests/golden -m "not slow" -n $(WORKERS) --every $(EVERY)

everywhere: $(VENV)/.dev  ## the tests of numbers on other processors' code paths (SETTINGS="avx2 least": some)
	WORKERS=$(WORKERS) PYTHON_UNDER_TEST=$(BIN)/python .ci/everywhere $(SETTINGS)

versions:  ## the tests without torch on other versions (PYTHON=python3.13 WITH="jax==0.12.0 optax==0.2.8")
	rm -rf build/versions && $(PYTHON) -m venv build/versions
	PIP_CONSTRAINT= PIP_BUILD_CONSTRAINT= build/versions/bin/python -m pip install --quiet ".[checks,evidence]" $(WITH)
	build/versions/bin/python -m pytest tests -m "not slow and not clients and not keras" -n $(WORKERS)

clients: $(VENV)/.dev  ## transformers, lightning and accelerate on the torch bridge and its classes
	$(PYTEST) -m clients

keras: $(VENV)/.dev  ## the Keras bridge, one process a backend (BACKENDS="jax torch")
	for backend in $(BACKENDS); do \
	  echo "KERAS_BACKEND=$$backend"; \
	  KERAS_BACKEND=$$backend $(PYTEST) --doctest-modules $(KERAS) tests/bridges/keras -n $(WORKERS) || exit 1; \
	done

notebooks: $(VENV)/.dev  ## execute every notebook, and every script of notebooks/scripts at a tiny size
	KERAS_BACKEND=jax $(BIN)/python notebooks/run.py

docs: $(VENV)/.dev  ## the site in build/site; warnings are errors, and so are links into nothing
	$(BIN)/python -m sphinx -W --keep-going -q docs build/site
	$(BIN)/python docs/check_links.py build/site

a11y: docs  ## axe-core over every page of the site (needs node and npm)
	npm install --silent --no-audit --no-fund --prefix build/a11y axe-core@4.14.1 jsdom@26.1.0
	node docs/a11y.mjs build/site build/a11y

sanitize: $(VENV)/.dev  ## address and undefined-behaviour sanitizers over the kernel
	PATH="$(CURDIR)/$(BIN):$$PATH" native/sanitize.sh

bench: $(VENV)/.dev  ## the speed ratios of the README
	for script in benchmarks/speed/*.py; do $(BIN)/python "$$script" || exit 1; done

dist: $(VENV)/.dev  ## sdist and wheel in build/dist; doctor and demo run where nothing but the wheel is installed
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist
	$(PYTHON) -m venv build/dist/venv
	build/dist/venv/bin/python -m pip install --quiet build/dist/*.whl
	build/dist/venv/bin/chainrule doctor
	build/dist/venv/bin/chainrule demo --quick

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(BIN)/python
	$(call install,demo)
	@touch $@

$(VENV)/.test: $(INPUTS) | $(BIN)/python
	$(call install,test)
	@touch $(VENV)/.demo $@

$(VENV)/.dev: $(INPUTS) | $(BIN)/python
	$(call install,dev)
	@touch $(VENV)/.demo $(VENV)/.test $@
