# `make help` lists the targets. Each one that needs it makes .venv first.
.DEFAULT_GOAL := help
.PHONY: help setup gl demo comparison test test-slow conformance lint format clean

PY := .venv/bin/python
# Where `make demo` writes, and more options for it: make demo DEMO="--episodes 20"
OUT ?= runs/demo
DEMO ?=
# Where `make comparison` keeps its records, and what can be made again
RECORDS ?= docs/results
WORK ?= runs/comparison
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

# Everything in docs/comparison.md. The emulated backend gives the same numbers on every machine.
COMPARE = .venv/bin/omega-qvla compare --checkpoint assets/pi05-metaworld \
	--checkpoint assets/groot-n15-metaworld --outliers --backend emulated --work "$(WORK)"

comparison: gl ## Build, measure and play all baselines and ablations (hours; goes on where it was)
	@$(COMPARE) --recipes presets --episodes 0 --out "$(RECORDS)/comparison"
	@$(COMPARE) --recipes rtn --recipes ablations --episodes 0 --out "$(RECORDS)/ablations"
	@$(COMPARE) --recipes presets --episodes 20 --out "$(RECORDS)/comparison"
	@set -e; for name in pi05 groot_n15; do \
	    cell="$(WORK)/$$name/outliers"; seen="$(WORK)/observations"; \
	    [ -f "$(RECORDS)/layers/$$name/layers.json" ] || .venv/bin/omega-qvla inspect \
	        "$$cell/omega.safetensors" --layers --checkpoint "$$cell/checkpoint" \
	        --observations "$$seen/held-out.safetensors" --num-samples 24 \
	        --backend emulated --out "$(RECORDS)/layers/$$name"; \
	    [ -f "$(RECORDS)/open-loop/$$name/open-loop.json" ] || .venv/bin/omega-qvla compare \
	        --checkpoint "$$cell/checkpoint" --observations "$$seen/calibration.safetensors" \
	        --pack rtn="$$cell/rtn.safetensors" --pack omega-paper="$$cell/omega-paper.safetensors" \
	        --pack omega="$$cell/omega.safetensors" --episode 200001 --episode-task drawer-open \
	        --backend emulated --out "$(RECORDS)/open-loop/$$name"; \
	done

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
