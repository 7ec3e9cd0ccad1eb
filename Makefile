# The environment lives in $(VENV); nothing outside the checkout is touched.
#   PYTHON       the interpreter that makes it (3.11 or newer)
#   TORCH_INDEX  an extra package index for torch.  On Linux without an NVIDIA GPU,
#                TORCH_INDEX=https://download.pytorch.org/whl/cpu saves several gigabytes.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST_ARGS ?=
SITE ?= site

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BASE_STAMP := $(VENV)/.stamp-base
DEV_STAMP := $(VENV)/.stamp-dev
NOT_HERE := not slow and not gpu and not vllm and not deepspeed
MYPY_TARGETS := rllib_gtpo envs/rllib_gtpo_envs

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test test-slow lint format types docs check ci build clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH_INDEX=$(TORCH_INDEX)"
	@echo "  Without a GPU: make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U pip

$(BASE_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(BASE_STAMP)

install: $(BASE_STAMP) ## Install the package into .venv

install-dev: $(DEV_STAMP) ## Install it with the development tools

quickstart: $(BASE_STAMP) ## Install, then train the calculator agent on the CPU
	$(BIN)/rllib train file tuned_examples/gtpo_calculator.py

test: $(DEV_STAMP) ## Run the tests (base and dev)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "$(NOT_HERE)" $(PYTEST_ARGS)

test-slow: $(DEV_STAMP) ## Run the slow tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu and not vllm and not deepspeed" $(PYTEST_ARGS)

lint: $(DEV_STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP) ## Fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_STAMP) ## Check types
	$(BIN)/mypy $(MYPY_TARGETS)

# The variable silences the announcement of mkdocs-material's successor.
docs: $(DEV_STAMP) ## Build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict --site-dir "$(SITE)"

check: lint types test ## Everything a change must pass

ci: ## What the build server runs, in its own environment
	./.ci/run

build: $(DEV_STAMP) ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m build

clean: ## Remove environments, caches and build products (runs/ stays)
	rm -rf .venv .ci-venv dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
