# Every target sets up what it needs: `make run` and `make test` work on a fresh checkout with nothing
# but Python (3.11 to 3.13) and make.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help run test check lint proto docs reference wheel lock clean

NODES ?= 3
DATA ?= ./data
# Worker processes of pytest; 0 runs everything in one process.
JOBS ?= 2
TESTS ?= tests

BIN := .venv/bin
RUN_READY := .venv/.ready-run
DEV_READY := .venv/.ready-dev
STUBS := elastickv/pb/.generated
LOCK_INPUTS := pyproject.toml setup.py requirements-build.lock scripts/setup.sh
PROTO_INPUTS := $(wildcard proto/*.proto) scripts/generate_stubs.py

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# A development set-up is a superset, so it satisfies `make run` too.
$(RUN_READY): requirements.lock $(LOCK_INPUTS)
	@if [ ! -e $(DEV_READY) ]; then scripts/setup.sh run; else scripts/setup.sh dev && touch $(DEV_READY); fi
	@touch $@

$(DEV_READY): requirements-dev.lock requirements.lock $(LOCK_INPUTS)
	@scripts/setup.sh dev
	@touch $(RUN_READY) $@

$(STUBS): $(RUN_READY) $(PROTO_INPUTS)
	@$(BIN)/python scripts/generate_stubs.py
	@touch $@

run: $(RUN_READY) $(STUBS) ## start a local cluster in the foreground (NODES=3 DATA=./data)
	@exec $(BIN)/elastickv local-cluster --nodes "$(NODES)" --data "$(DATA)"

test: $(DEV_READY) $(STUBS) ## run the whole test suite (JOBS=2 TESTS=tests)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

lint: $(DEV_READY) $(STUBS)
	@$(BIN)/ruff check .
	@$(BIN)/mypy --strict elastickv
	@$(BIN)/python -m pytest -q tests/test_layers.py

check: lint test ## ruff, mypy --strict, the layer table and every test

proto: $(RUN_READY) ## generate elastickv/pb from proto/
	@$(BIN)/python scripts/generate_stubs.py
	@touch $(STUBS)

reference: $(DEV_READY) $(STUBS) ## write the generated pages of docs
	@$(BIN)/python scripts/generate_reference.py

docs: $(DEV_READY) $(STUBS) ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(DEV_READY) ## build a wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --no-index -w dist .

lock: $(DEV_READY) ## resolve the lock files again (UPGRADE=1 for newest versions)
	@scripts/lock.sh

clean: ## remove everything that make made, except the data directory
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f elastickv/pb/*_pb2*.py elastickv/pb/*_pb2*.pyi $(STUBS)
	find elastickv tests jepsen scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# The long work: simulation, fault injection, benchmarks.
include tests/sim/sim.mk jepsen/jepsen.mk tests/bench/bench.mk
