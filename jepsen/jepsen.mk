# Fault injection: see jepsen/README.md.
.PHONY: jepsen jepsen-all

WORKLOAD ?= register
FAULTS ?= kill-one,partition-halves
TIME ?= 60

# Without them some faults are not available, and a run that asks for those ends as unknown.
.PHONY: jepsen-packages
jepsen-packages:
	@jepsen/install.sh || echo "jepsen/install.sh did not succeed: some faults are not available" >&2

jepsen: $(DEV_READY) $(STUBS) jepsen-packages ## break a real cluster (WORKLOAD=register FAULTS=... TIME=60 SEED=)
	@$(BIN)/python -m jepsen run --workload "$(WORKLOAD)" --faults "$(FAULTS)" --time "$(TIME)" \
		--nodes "$(NODES)" $(if $(SEED),--seed "$(SEED)")

jepsen-all: $(DEV_READY) $(STUBS) jepsen-packages ## every workload with every fault package (at most 30 minutes)
	@$(BIN)/python -m jepsen all $(if $(SEED),--seed "$(SEED)")
