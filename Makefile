# Foedus: `make demo` and `make test` work on a fresh machine with Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test lint bench stubs clean

# The stamp is remade when the dependencies change, so that an old .venv never serves a new pyproject.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Foedus needs Python 3.11 or newer.")'
	@echo "Installing into $(VENV): a minute or two."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

# Three hospitals and a coordinator on this machine. One of these may be given: SMALL=1, the two-minute edition;
# PRIVACY=off, the same without differential privacy; DATA=credit, three bank branches.
DEMO := $(if $(SMALL),--small) $(if $(PRIVACY),--privacy $(PRIVACY)) $(if $(DATA),--data $(DATA))
demo: $(READY)
	$(BIN)/python -m foedus_simulations.demo $(DEMO)

# Real processes have deadlines, so those tests have the machine to themselves.
test: lint
	$(BIN)/pytest -q --numprocesses auto --maxprocesses 4 --ignore tests/cluster
	$(BIN)/pytest -q tests/cluster

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

NO_CLAIM := $(addprefix benchmarks/,costs.py epsilon_central.py gpu_check.py plots.py report.py resident.py rounds.py sites.py summary.py)

# Every claim is a ratio or a limit measured in one run; results go to benchmarks/results.
bench: $(READY)
	@failed=; for claim in $(filter-out $(NO_CLAIM),$(wildcard benchmarks/*.py)); do \
		$(BIN)/python $$claim || failed=1; \
	done; $(BIN)/python benchmarks/summary.py && test -z "$$failed"

# kill -9 at 24 points of a run, each with five seeds, on SQLite and PostgreSQL: about twenty minutes. SEEDS="1 2" and
# DATABASE=sqlite (or postgresql) choose.
.PHONY: crash-matrix
crash-matrix: $(READY)
	@PYTHONPATH=tests:tests/cluster $(BIN)/python tests/cluster/crash/matrix.py

# The same, and with a disk that fails and clocks that jump at the same 24 points; then bad networks. For a night.
.PHONY: nightly
nightly: $(READY)
	@TROUBLES="kill disk ahead behind" PYTHONPATH=tests:tests/cluster $(BIN)/python tests/cluster/crash/matrix.py
	@$(MAKE) netfaults

# The tables and the plot of docs/costs.md, measured anew on this machine.
.PHONY: costs
costs: $(READY)
	$(BIN)/python benchmarks/costs.py

# Delays, stalls, cuts, half-open connections and partitions at each stage of a round: about five minutes.
.PHONY: netfaults
netfaults: $(READY)
	@PYTHONPATH=tests:tests/cluster $(BIN)/python tests/cluster/netfaults/table.py

# What only a machine with an NVIDIA card can show; the result goes to docs/results-gpu.md.
.PHONY: gpu-check
gpu-check: $(READY)
	@PYTHONPATH=tests $(BIN)/python benchmarks/gpu_check.py

# The committed gRPC stubs, from the one .proto file.
stubs: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I common --python_out=common --grpc_python_out=common common/foedus_common/link/foedus.proto

# Released vectors and adapters under attack, and whether seeded faults would be seen: about four minutes.
# AUDIT="--seed 1" is another audit, AUDIT=--json prints one document.
.PHONY: privacy-audit
privacy-audit: $(READY)
	@PYTHONPATH=tests $(BIN)/python -m privacy_audit $(AUDIT)

# Both epsilons and the accuracy of one step a round and of several: about three minutes.
.PHONY: epsilon-central
epsilon-central: $(READY)
	@$(BIN)/python benchmarks/epsilon_central.py

clean:
	rm -rf demo .cache

# Every attack of a coordinator that cheats, against real sites: attack, named error, session, opening attack.
.PHONY: adversary
adversary: $(READY)
	@$(BIN)/python tests/adversary/table.py

# Mutated inputs for every parser that faces the network or a file: about an hour on two cores; N=10000 for a quick look.
.PHONY: fuzz
N ?= 1000000
fuzz: $(READY)
	@$(BIN)/python -W ignore tests/fuzz/fuzz.py --inputs $(N)

# Strangers' handshakes by the thousand while the coordinator's certificate changes: gRPC's own exchange crashed here.
.PHONY: hammer
hammer: $(READY)
	@PYTHONPATH=tests $(BIN)/python tests/link/hammer.py
