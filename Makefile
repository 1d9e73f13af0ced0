SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup check test test-slow fuzz demo bench generate

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PACKAGES := baton router prefill_worker decode_worker kvtransfer engine placement deploy
WITHOUT_CLUSTERS := tests/property tests/fuzz tests/unit tests/gpu
ON_CLUSTERS := tests/cluster tests/e2e
PROMPT ?= Why is the sky blue? Answer in two sentences.
FUZZ_S ?= 60
BENCH ?= --rate 1 --requests 60

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything in it (once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Baton needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a few minutes"
	@$(INSTALL) --editable '.[dev,bench]'
	@touch $@

check: setup ## format, lint, types, import layers, generated code, GPU kernels
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(PACKAGES) bench proto/generate.py docs/generate.py
	$(BIN)/lint-imports --no-logo
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/python deploy/generate.py --check
	$(BIN)/python -m deploy.monitoring --check
	$(BIN)/python -m engine.kernels.aot

test: setup ## every test but the slow ones and those that need a GPU
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile -m 'not slow and not gpu' $(WITHOUT_CLUSTERS)
	$(BIN)/pytest -m 'not slow and not gpu' $(ON_CLUSTERS)

fuzz: setup ## fuzz every parser of bytes from the wire; FUZZ_S=60 is for how long each
	@$(INSTALL) --editable '.[dev,bench,fuzz]'
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(FUZZ_S)

test-slow: setup ## the slow tests
	$(BIN)/pytest -m 'slow and not gpu'

demo: setup ## start a local cluster, stream one answer with its stage ledger, stop the cluster
	@$(BIN)/baton model pull
	@$(BIN)/baton up --name demo; \
	trap '$(BIN)/baton down --name demo' EXIT; \
	$(BIN)/baton generate --name demo --max-tokens 64 --temperature 0 "$(PROMPT)"

bench: setup ## load on a running cluster; BENCH='--rate 2 ...' sets the options
	$(BIN)/python -m bench.goodput $(BENCH)

generate: setup ## rewrite generated stubs and docs
	$(BIN)/python proto/generate.py
	$(BIN)/python docs/generate.py
	$(BIN)/python deploy/generate.py
	$(BIN)/python -m deploy.monitoring
