# `make` alone prints this list. Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
BIN := .venv/bin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

setup: ## Set up .venv (does nothing when it is up to date)
	@scripts/setup.sh

demo: setup ## Compile the demo recipe, measure it, judge it, publish it
	@scripts/demo.sh

test: setup ## Run the whole test suite (ARGS="-k recipe" is passed to pytest)
	@scripts/test_tools.sh
	$(BIN)/python -m pytest $(ARGS)

test-fast: setup ## Run the tests that take no more than a few seconds each
	@scripts/test_tools.sh
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

check: setup ## Lint, check the format, check the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup ## Measure the whole demo job, then compare the quantization methods (some 30 minutes)
	$(BIN)/python benchmarks/whole_job.py
	$(BIN)/python benchmarks/quantizers.py $(ARGS)

clean: ## Remove .venv, caches and built packages; artifacts/ is kept
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -prune -exec rm -rf {} +
