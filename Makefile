# make quickstart          prepare, train, evaluate and report (SMOKE=1: shortest)
# make table               the same with every ratio of the table
# make test                linter, formatter and tests
# make lint | format | clean
#
# EXTRAS=cuda13 (cuda12, tpu) installs JAX for an accelerator as well.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
EXTRAS ?=
comma := ,

# An installation is redone when what it depends on has changed.
KEY := $(shell cat setup.py pyproject.toml Makefile | cksum | cut -d" " -f1)
CORE := $(VENV)/.core-$(KEY)-$(EXTRAS)
DEV := $(VENV)/.dev-$(KEY)-$(EXTRAS)

# Compiled programs are kept, so that the second run starts at once.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/workdirs/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5
export PYTHONPATH := $(CURDIR)

PYTEST_ARGS ?= -n 2 --dist loadfile
CHECKED := .

.DELETE_ON_ERROR:
.PHONY: quickstart table test lint format clean

quickstart: $(CORE)
	$(BIN)/python -m experiments.quickstart $(if $(SMOKE),--smoke)

table: $(CORE)
	$(BIN)/python -m experiments.quickstart --workdir=workdirs/table \
	  --ratios=0.25,0.20,0.15,0.10,0.05

test: lint
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check -q $(CHECKED)
	$(BIN)/ruff format -q --check $(CHECKED)

format: $(DEV)
	$(BIN)/ruff check -q --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import sys, venv, ensurepip; \
	      sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer with the venv module found:" \
	  "install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1

$(CORE): | $(BIN)/python
	@echo "installing cacovid_jax into $(VENV) (a minute or two)"
	@$(PIP) install -e ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

# Torch first and by itself: where a CPU build of just this version is on offer,
# it is taken, and nothing later replaces it by one with several GB of CUDA.
$(DEV): $(CORE)
	@echo "installing what the tests need (a minute or two)"
	@$(PIP) install torch==2.13.0
	@$(PIP) install -e ".[$(if $(EXTRAS),$(EXTRAS)$(comma))hf,dev]" torch==2.13.0
	@touch $@
