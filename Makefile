# Everything sets itself up: `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT_FROM := pyproject.toml hatch_build.py $(wildcard shardmesh/engine/*.[ch])
# Made after an installation; one of those being newer than its stamp means: install again.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow lint bench fuzz sim faults siege archs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(INSTALLED) ## Start a mesh of real processes on this machine and let it write
	$(BIN)/shardmesh demo

test: lint ## Lint, types, import rules and the tests, the quick ones first: about 8 minutes
	$(BIN)/python -m pytest -m "not (processes or browser)" -n 2
	$(BIN)/python -m pytest -m "(processes or browser) and not slow or recovery" --reruns 1

test-slow: $(INSTALLED_DEV) ## The process tests that take long: faults, siege, crowds, relays, weights
	$(BIN)/python -m pytest -m "(processes or browser) and slow" --reruns 1

test-fast: $(INSTALLED_DEV) ## Only the tests that take no more than moments
	$(BIN)/python -m pytest -m "not slow and not processes"

lint: $(INSTALLED_DEV) ## Lint, format, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## Measure the mesh against one llama.cpp process
	$(BIN)/shardmesh bench all

fuzz: $(INSTALLED_DEV) ## Altered inputs to every parser, and many more examples of the property tests: half an hour
	$(BIN)/python tests/fuzz/fuzz.py --seconds 300
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=fuzz --timeout=3600

sim: $(INSTALLED_DEV) ## Simulated meshes with seeded faults: SEEDS=10000, FIRST=0
	cd tests && PYTHONPATH=. $(abspath $(BIN))/python -m sim --seeds $(or $(SEEDS),1000) --first $(or $(FIRST),0)

faults: $(INSTALLED_DEV) ## Every row of the fault table, with real processes: 20 minutes; writes build/faults.json
	cd tests && PYTHONPATH=. $(abspath $(BIN))/python -m faults

siege: $(INSTALLED_DEV) ## Five minutes of sessions while a process is killed every ten seconds
	SHARDMESH_FAULTS=full $(BIN)/python -m pytest tests/faults/test_siege.py -rA --timeout=900

docs/architectures.md: shardmesh/shards/architectures.py shardmesh/shards/architecture_rules.py scripts/write_architectures_doc.py | $(INSTALLED)
	$(BIN)/python scripts/write_architectures_doc.py

archs: $(INSTALLED_DEV) ## Cut a small model of every architecture wherever it can be, and compare bit for bit
	$(BIN)/python scripts/check_archs.py

clean: ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find shardmesh tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): $(BUILT_FROM)
	@$(PYTHON) scripts/set_up.py $(VENV) .
	@touch $@

$(INSTALLED_DEV): $(BUILT_FROM)
	@$(PYTHON) scripts/set_up.py $(VENV) ".[dev]"
	@touch $(INSTALLED) $@
