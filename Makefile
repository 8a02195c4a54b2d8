# `make` alone lists the targets. Nothing here uses the network but pip.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

# The interpreter of a new .venv, instead of the first that fits: PYTHON=python3.12.
PYTHON ?=
PY := .venv/bin/python
FITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
WORKERS ?= 2

.PHONY: help train report bench drill test test-fast lint typecheck clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | \
	  awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

train: .venv/installed-train ## train, evaluate, export, reload and predict digits
	@$(PY) -m experiments.digits --mode=all

# RUNS="runs/a runs/b" for others than the latest.
report: .venv/installed-plots ## show the latest run as a page with curves
	@$(PY) -m mpl.tools.report $(RUNS)

# BENCH_FLAGS=--full for everything; BENCH_FLAGS=--help for the rest.
bench: .venv/installed-bench ## compare with a hand-written loop, Keras fit and Orbit
	@$(PY) -m experiments.benchmarks --out=runs/bench $(BENCH_FLAGS)

# DRILL_FLAGS="--only=kills,damages --kills=20" for less; exit code 1: something was lost.
drill: .venv/installed-test ## kill, damage and stop runs that must lose nothing
	@$(PY) -m tests.drill --out=runs/drill $(DRILL_FLAGS)

test: .venv/installed-test ## run all tests
	@$(PY) -m pytest -q -n $(WORKERS)

test-fast: .venv/installed-test ## run the tests that take a few seconds at most
	@$(PY) -m pytest -q -n $(WORKERS) -m "not slow"

lint: .venv/installed-dev ## check the style (flake8)
	@$(PY) -m flake8 mpl experiments tests setup.py

typecheck: .venv/installed-dev ## check the types (mypy)
	@$(PY) -m mypy

clean: ## remove .venv, caches and build files; runs/ stays
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

.venv/installed-plots: EXTRAS := plots
.venv/installed-train: EXTRAS := tensorboard,plots,terminal
.venv/installed-test: EXTRAS := test
.venv/installed-dev: EXTRAS := dev

# One rule for the sets of extras; each runs again when setup.cfg changes.
.venv/installed-%: setup.cfg | $(PY)
	@echo "Installing mpl[$(EXTRAS)] into .venv (the first time: minutes, 2 GB) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' || \
	  { echo "pip could not install mpl[$(EXTRAS)]." >&2; \
	    echo "See its message above; if .venv is damaged, run make clean first." >&2; \
	    exit 1; }
	@touch $@

# Orbit needs of its package's many dependencies tf_keras alone, and runs on the
# TensorFlow that is here, though the package pins an older one.
.venv/installed-bench: .venv/installed-plots
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
	  'tf-models-official==2.20.*' 'tf_keras==2.21.*' && \
	  $(PY) -c 'import orbit' 2>/dev/null && touch $@ || \
	  echo "Orbit could not be installed: the benchmark goes on without it." >&2

$(PY):
	@for python in $(if $(PYTHON),'$(PYTHON)',python3.13 python3.12 python3.11 python3); do \
	  if "$$python" -c '$(FITS)' >/dev/null 2>&1; then \
	    echo "Making .venv with $$("$$python" --version)"; \
	    exec "$$python" -m venv --clear .venv; \
	  fi; \
	done; \
	echo "No Python 3.11, 3.12 or 3.13 with venv$(if $(PYTHON), at PYTHON=$(PYTHON))." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1
