# Included by the main Makefile. QUICK=1 measures the main points in under six minutes.
.PHONY: bench

bench: $(DEV_READY) $(STUBS) ## compare with etcd on this machine (QUICK=1 for the main points, PART=encryption|tls|sizes, FRONT=h2|grpc)
	@tests/bench/install.sh
	@$(BIN)/python tests/bench/run.py $(if $(QUICK),--quick) $(if $(PART),--part $(PART)) --front $(or $(FRONT),h2)
