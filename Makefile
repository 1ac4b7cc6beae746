# `make help` lists the targets. Each one that needs it makes .venv first.
.DEFAULT_GOAL := help
.PHONY: help setup gl demo test test-slow conformance lint format clean

PY := .venv/bin/python
# Where `make demo` writes, and more options for it: make demo DEMO="--episodes 20"
OUT ?= runs/demo
DEMO ?=
# Test processes, and more options for pytest: make test PYTEST="-k pack"
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc); echo $$((n < 8 ? n : 8)))
PYTEST ?=
# Directory of recorded cases for `make conformance`; default: those in tests/data/conformance
CASES ?=

# Tests run side by side, one thread each: more would only wait for each other.
RUN_TESTS = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## Make .venv with everything in it (done by the others as needed)
	@scripts/setup.sh venv

gl: setup
	@scripts/setup.sh gl

demo: gl ## Quantize both bundled policies, run them in the simulator, write a report
	@.venv/bin/omega-qvla demo --out "$(OUT)" $(DEMO)

test: gl ## Run the tests (all but the slow ones)
	@$(RUN_TESTS) -m "not slow" $(PYTEST)

test-slow: gl ## Run the tests that take minutes
	@$(RUN_TESTS) -m slow $(PYTEST)

conformance: setup ## Compare both models with recorded cases; CASES=DIR for others
	@$(PY) -m pytest tests/conformance $(if $(CASES),--cases "$(CASES)") $(PYTEST)

lint: setup ## Check style, formatting and types
	@failed=0; $(PY) -m ruff check . || failed=1; $(PY) -m ruff format --check . || failed=1; \
	$(PY) -m mypy || failed=1; exit $$failed

format: setup ## Mend style and formatting where that is mechanical
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## Remove .venv and everything that tools leave (not runs/)
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
