# make quickstart          prepare, train, evaluate and report (SMOKE=1: shortest)
# make table               the same with every ratio of the table
# make test                linter, formatter and tests
# make lmms-test           tests under lmms-eval, in .venv-lmms (lmms-env makes it)
# make browser-test        tests of the report in a Chromium
# make wheel-test          builds a wheel, installs it apart and asks a clip with it
# make docs               builds the site into docs/_build, warnings are errors
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
DOCS := $(VENV)/.docs-$(KEY)-$(EXTRAS)
# lmms-eval has an environment of its own: it holds PyAV and others back. Pip
# is not to find the package in this folder before it is installed there.
LMMS_VENV := .venv-lmms
LMMS := $(LMMS_VENV)/.lmms-$(KEY)
LMMS_PIP := PYTHONPATH= $(LMMS_VENV)/bin/python -m pip \
  --disable-pip-version-check -qq

# Compiled programs are kept, so that the second run starts at once.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/workdirs/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1
export PYTHONPATH := $(CURDIR)

PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
CHECKED := .

.DELETE_ON_ERROR:
.PHONY: quickstart table test lmms-env lmms-test browser-test wheel-test docs \
  lint format clean

quickstart: $(CORE)
	$(BIN)/python -m experiments.quickstart $(if $(SMOKE),--smoke)

table: $(CORE)
	$(BIN)/python -m experiments.quickstart --workdir=workdirs/table \
	  --ratios=0.25,0.20,0.15,0.10,0.05

test: lint
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lmms-env: $(LMMS)

lmms-test: $(LMMS)
	$(LMMS_VENV)/bin/python -m pytest -q $(PYTEST_ARGS) tests/integrations/lmms

# One process: a browser is enough for two cores.
browser-test: $(DEV)
	$(BIN)/python -m pytest -q tests/browser

# Outside the repository and without its path: what is not in the wheel fails.
wheel-test: export PYTHONPATH :=
wheel-test: $(BIN)/python
	rm -rf dist build .venv-wheel
	$(PIP) wheel --no-deps --wheel-dir dist .
	$(BIN)/python -m venv .venv-wheel
	.venv-wheel/bin/python -m pip --disable-pip-version-check -qq install dist/*.whl
	@folder=$$(mktemp -d) && cd $$folder && \
	  python=$(CURDIR)/.venv-wheel/bin/python && \
	  $$python -m cacovid_jax.prepare --out data --clips 1,0,0,0 && \
	  $$python -m cacovid_jax.answer --video data/dense/videos/*.mp4 \
	    --question "Which of these appears first?" \
	    --options "red moon,blue star" --report answer.html && \
	  test -s answer.html && rm -rf $$folder && echo "wheel: 1 passed, 0 failed"

# Pages of modules are written anew, so that none outlives its module.
docs: $(DOCS)
	rm -rf docs/_api docs/_build
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -W --keep-going -b html docs \
	  docs/_build/html
	@echo "open docs/_build/html/index.html in a browser"

lint: $(DEV)
	$(BIN)/ruff check -q $(CHECKED)
	$(BIN)/ruff format -q --check $(CHECKED)
	$(BIN)/lint-imports
	$(BIN)/python -m tests.house

format: $(DEV)
	$(BIN)/ruff check -q --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean:
	rm -rf $(VENV) $(LMMS_VENV) .venv-wheel build dist docs/_api docs/_build *.egg-info .pytest_cache .ruff_cache

$(BIN)/python $(LMMS_VENV)/bin/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import sys, venv, ensurepip; \
	      sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(@D:/bin=) with $$($$python --version)"; \
	    exec $$python -m venv $(@D:/bin=); \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer with the venv module found:" \
	  "install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1

$(CORE): | $(BIN)/python
	@echo "installing cacovid_jax into $(VENV) (a minute or two)"
	@$(PIP) install -e ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

$(DOCS): $(CORE)
	@echo "installing what the site needs (a minute)"
	@$(PIP) install -e ".[$(if $(EXTRAS),$(EXTRAS)$(comma))docs]"
	@touch $@

# Torch first and by itself: where a CPU build of just this version is on offer,
# it is taken, and nothing later replaces it by one with several GB of CUDA.
$(DEV): $(CORE)
	@echo "installing what the tests need (a minute or two)"
	@$(PIP) install torch==2.13.0
	@$(PIP) install -e ".[$(if $(EXTRAS),$(EXTRAS)$(comma))hf,dev]" torch==2.13.0
	@touch $@

# Torch first, as above. The torchvision that comes along is built for another
# torch, and transformers fails to import with it; without it nothing is missed.
# A task of lmms-eval imports decord, whose own dependencies are there already.
$(LMMS): | $(LMMS_VENV)/bin/python
	@echo "installing lmms-eval into $(LMMS_VENV) (a few minutes)"
	@$(LMMS_PIP) install torch==2.13.0
	@$(LMMS_PIP) install -e ".[lmms]" torch==2.13.0 \
	  pytest "pytest-xdist>=3.8"
	@$(LMMS_PIP) uninstall -y torchvision
	@$(LMMS_PIP) install --no-deps decord
	@touch $@
