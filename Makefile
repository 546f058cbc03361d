# The two commands: `make serve` and `make test`. Both set everything up in .venv first, once.
SHELL := /bin/bash
VENV  ?= .venv
BIN   := $(VENV)/bin
MODEL ?= demo
ARGS  ?=

# What an installed environment depends on: when one of these changes, the next make installs again.
INPUTS := requirements/install $(wildcard requirements/*.txt) pyproject.toml $(wildcard setup.py) \
          $(wildcard kernels/neuqi_kernels/csrc/*)

.PHONY: setup serve test check format emulation deployment-tools wheel clean

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

# The kernel for Arm is tested with a cross compiler and an emulator; elsewhere than on Debian, and without root, that
# test says what is missing and is skipped.
emulation:  ## Install what tests the Arm kernel on another CPU (Debian, root)
	@if command -v aarch64-linux-gnu-g++ qemu-aarch64 | wc -l | grep -qx 2; then echo "emulation is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user; \
	else echo "expected apt-get and root to install g++-aarch64-linux-gnu and qemu-user, got neither or one; install" \
	  "an aarch64-linux-gnu-g++ and a qemu-aarch64 by other means" >&2; exit 1; fi

# What checks deploy/: an environment beside the others (checkov pins older packages), kubectl and Prometheus.
deployment-tools: $(VENV)/.deploy.stamp  ## Install what checks the images and manifests (Debian, root)
	@kubectl version --client >/dev/null && command -v promtool prometheus >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    packages=$$(command -v promtool >/dev/null || echo prometheus; command -v kubectl >/dev/null || echo kubernetes-client); \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages; \
	  else echo "expected kubectl, promtool and prometheus, and neither apt-get nor root to install them; install them by" \
	    "other means" >&2; exit 1; fi; }
	@kubectl kustomize deploy/kubernetes/overlays/cpu >/dev/null || { \
	  echo "expected a kubectl with Kustomize 4.1 or newer, got $$(kubectl version --client 2>&1 | tail -1)" >&2; exit 1; }

$(VENV)/.deploy.stamp: $(VENV)/.serve.stamp requirements/deploy.txt
	$(BIN)/python -m venv $(VENV)/deploy
	$(VENV)/deploy/bin/pip --disable-pip-version-check --quiet install --no-deps -r requirements/deploy.txt
	@touch $@

wheel: $(VENV)/.dev.stamp
	$(BIN)/python -m build --no-isolation --wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
