# make test and make bench do all set-up themselves: a virtual environment, the dependencies and
# the build. The second time they start at once; changed native sources are rebuilt first.
#
#   make bench ARGS="--quick --networks preresnet20"
#   make test ARGS="-k fuse"
#   make test TORCH="torch==2.10.0 torchvision==0.25.0" VENV=.venv-2.10
#   make test PYTHON=python3.12

VENV ?= .venv
PYTHON ?= python3 python3.11 python3.12 python3.13 python3.14 python3.10
TORCH ?=
ARGS ?=

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN := $(VENV)/bin/python
CONSTRAINTS := $(VENV)/constraints.txt
NATIVE := setup.py $(wildcard csrc/*.* csrc/*/*.*)
EMULATION := tests/cuda_emulation
# What clang-format formats: all C++.
FORMATTED := $(wildcard csrc/*.cpp csrc/common/* csrc/cpu/* csrc/cuda/* $(addprefix $(EMULATION)/,*.cpp *.h include/*.h include/cuda/*) tests/tile_emulation/* tests/turns/* benchmarks/*.cpp)
# Ninja and whatever else the environment brings must be found by name.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help setup bench test lint format types wheel environment clean
.DEFAULT_GOAL := help

help:
	@echo 'make bench        the benchmark (ARGS="--list", "--quick", ...)'
	@echo 'make test         the tests (ARGS for pytest)'
	@echo 'make lint         ruff and clang-format; make format repairs what it can'
	@echo 'make types        mypy'
	@echo 'make wheel        a wheel in dist/'
	@echo 'make environment  what is installed, built and usable'
	@echo 'make clean        removes the environment and everything built'

# The first Python on the list that is new enough, complete, and has a PyTorch to install.
$(VENV)/.torch: constraints.txt
	@for python in $(PYTHON); do \
	  $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
	    2>/dev/null || continue; \
	  echo "Setting up $(VENV) with $$($$python --version); the first time takes some minutes."; \
	  [ "$$($(RUN) --version 2>&1)" = "$$($$python --version)" ] || \
	    $$python -m venv --clear $(VENV) || continue; \
	  $(if $(TORCH),grep -v '^torch',cat) constraints.txt > $(CONSTRAINTS); \
	  $(PIP) install --quiet -c $(CONSTRAINTS) \
	    $(or $(TORCH),torch torchvision) 'setuptools>=77' wheel ninja && touch $@ && exit 0; \
	  echo "PyTorch does not install for $$python."; \
	done; \
	echo 'No Python >= 3.10 with venv and an installable PyTorch was found; name one: PYTHON=...'; \
	exit 1

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[benchmarks,test,dev]'
	@touch $@

setup: $(VENV)/.installed

bench: setup
	@$(RUN) -m benchmarks $(ARGS)

test: setup
	@$(RUN) -m pytest -q -rs $(ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

types: setup
	$(RUN) -m mypy preact

wheel: setup
	$(RUN) -m build --no-isolation --wheel

environment: setup
	@$(RUN) -m preact.environment

clean:
	rm -rf $(VENV) build dist *.egg-info preact/*.so preact/_build.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
