# The two commands: `make serve` and `make test`. Both set everything up in .venv first, once.
SHELL := /bin/bash
VENV  ?= .venv
BIN   := $(VENV)/bin
MODEL ?= demo
ARGS  ?=

# What an installed environment depends on: when one of these changes, the next make installs again.
INPUTS := requirements/install $(wildcard requirements/*.txt) pyproject.toml $(wildcard setup.py) \
          $(wildcard kernels/neuqi_kernels/csrc/*)

.PHONY: setup serve test check format wheel clean

setup: $(VENV)/.serve.stamp

$(VENV)/.serve.stamp: $(INPUTS)
	requirements/install $(VENV)
	@touch $@

$(VENV)/.dev.stamp: $(VENV)/.serve.stamp requirements/dev.txt requirements/triton.txt
	requirements/install $(VENV) dev
	@touch $@

serve: $(VENV)/.serve.stamp  ## Serve MODEL (default: the embedded demo model) on 127.0.0.1:8000
	@exec $(BIN)/neuqi serve $(MODEL) $(ARGS)

test: $(VENV)/.dev.stamp  ## Run the whole suite
	$(BIN)/pytest $(ARGS)

check: $(VENV)/.dev.stamp  ## Lint, format, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev.stamp
	$(BIN)/python -m build --no-isolation --wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
