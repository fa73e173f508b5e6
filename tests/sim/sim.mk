# Deterministic simulation; docs/internals/simulation.md.

PY ?= .venv/bin/python
SEEDS ?= 1000
FIRST ?= 0

.PHONY: sim
sim: $(DEV_READY) $(STUBS) ## simulate a cluster under faults (SEEDS=1000 FIRST=0, or SEED=n to replay one)
	@$(PY) -m tests.sim $(if $(SEED),--seed $(SEED) $(if $(VERBOSE),--verbose),--seeds $(SEEDS) --first $(FIRST) --jobs $(JOBS))
