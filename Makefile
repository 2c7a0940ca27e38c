# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. Each one starts from an empty clone: the environment is made on first use and then reused.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help env test test-deploy lint format types next demo bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

env: ## create or update .venv (EVS_BACKEND=cpu|gpu overrides the detected one)
	@$(PYTHON) .ci/bootstrap.py

# Files are shared out whole, so that the tests of one share their engines; each process has up to 4 GB.
test: lint types ## lint, types and the test suite (ARGS="-k name" goes to pytest, JOBS=2 processes)
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-deploy: env ## start every deployment of docs/deployment.md on the CPU and write what came of it (20 minutes)
	@$(BIN)/python -m pytest tests/deploy -m "deploy or vllm" --deploy-report bench/results/deploy/topologies.md $(ARGS)

lint: env ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: env ## mend style and formatting where that can be done by itself
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: env ## check types
	@$(BIN)/mypy

next: env ## what breaks with a vLLM that has just come out (VLLM=0.34.0), without an engine
	@$(BIN)/python .ci/next_vllm.py $(or $(VLLM),$(error say which: make next VLLM=0.34.0))

demo: env ## show what is kept of a video, and what it saves (MODEL=, VIDEO=, RATE=)
	@$(BIN)/evs-vllm demo $(if $(MODEL),--model "$(MODEL)") $(if $(VIDEO),--video "$(VIDEO)") $(if $(RATE),--rate "$(RATE)")

bench: env ## measure the kernels, then serving for ten minutes (CONFIG= for another file of configs/bench)
	@$(BIN)/python -m bench.kernels
	@$(BIN)/python -m bench.serve $(or $(CONFIG),configs/bench/ten_minutes.yaml) $(ARGS)

clean: ## remove the environment, caches and build output
	rm -rf .venv .venv.lock build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
