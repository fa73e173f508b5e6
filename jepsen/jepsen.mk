# Fault injection: see jepsen/README.md.
.PHONY: jepsen jepsen-all

WORKLOAD ?= register
FAULTS ?= kill-one,partition-halves
TIME ?= 60

jepsen: $(DEV_READY) $(STUBS) ## break a real cluster (WORKLOAD=register FAULTS=... TIME=60 SEED=)
	@$(BIN)/python -m jepsen run --workload $(WORKLOAD) --faults $(FAULTS) --time $(TIME) \
		--nodes $(NODES) $(if $(SEED),--seed $(SEED))

jepsen-all: $(DEV_READY) $(STUBS) ## every workload with every fault package (at most 30 minutes)
	@$(BIN)/python -m jepsen all $(if $(SEED),--seed $(SEED))
