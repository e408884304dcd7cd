# make test | test-all | test-interop | test-peers | test-conformance | demo | docs | lint | bench | bench-train | bench-commits | bench-serving | soak | quality | test-lowest | test-native | test-native-tsan | test-arm | test-arm-short | test-arm-wheel | test-amx | bench-amx | test-cuda-interpreter | test-gpu | bench-gpu | native | fuzz | wheel | page-assets | clean: each works alone, from a fresh clone.
# Everything goes into .venv* and build/. PYTHON is the interpreter with which .venv is created.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := build/wheels
TESTS ?= tests
PYTEST_ARGS ?=
WORKERS ?= 2

# The sources of the wheel. If one of them changes, the wheel is rebuilt and reinstalled.
SOURCES := pyproject.toml README.md LICENSE $(wildcard CMakeLists.txt) \
  $(shell find native src build_tools -type f -not -name '*.pyc' -not -path '*/_native/*')

.PHONY: help env interop-env test test-all test-wide test-lowest test-interop test-cuda-interpreter test-gpu bench-gpu test-peers test-conformance demo docs docs-reference format lint bench bench-train bench-commits bench-serving soak quality wheel page-assets fuzz clean

help:
	@sed -n '1,2s/^# //p' Makefile

# The pip that comes with Python may be years old, and old releases resolve dependencies slowly.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# DSO_REQUIRE_NATIVE: a failing native build is an error here, not a fallback. The build backend (build_tools/) also fetches the
# libraries of the chat page; pip hides its output, so run `make page-assets` to see why they are missing.
$(WHEELS)/.built: $(VENV)/.created $(SOURCES)
	rm -rf $(WHEELS) && mkdir -p $(WHEELS)
	DSO_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) .
	touch $@

# The built wheel rather than an editable install, so that the tests see what a user gets.
$(VENV)/.installed: $(WHEELS)/.built
	$(BIN)/python -m pip install --quiet "$$(ls $(WHEELS)/*.whl)[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall $(WHEELS)/*.whl
	touch $@

# The libraries of the chat page, for a server that runs from the source tree. Building the wheel fetches them as well.
page-assets: $(VENV)/.created
	$(BIN)/python build_tools/page_assets.py

env: $(VENV)/.installed

wheel: $(WHEELS)/.built
	@ls $(WHEELS)/*.whl

# worksteal: each worker gets consecutive tests, so that fixtures shared by a file are created once.
# OMP_NUM_THREADS: two workers with two torch threads each would spend most of their time waiting for a CPU.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
# PYTHONDONTWRITEBYTECODE: where it is set, each worker and each Python that a test starts would compile everything again.
PYTEST := $(ONE_THREAD) PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: env
	DSO_WHEEL=$$(ls $(WHEELS)/*.whl) $(PYTEST) $(TESTS) $(PYTEST_ARGS)

# The other tests that CI runs, without those of `make test`.
test-all: test-native test-arm-short test-lowest test-interop test-conformance test-cuda-interpreter test-wide

test-wide: env
	DSO_WHEEL=$$(ls $(WHEELS)/*.whl) $(PYTEST) -m wide $(TESTS) $(PYTEST_ARGS)

# Transformers' own tests, on optimized and on plain models. CONFORMANCE: families and options (--all includes the slow tests).
CONFORMANCE ?=
test-conformance: env
	PYTHONPATH=tests $(BIN)/python -m conformance.run $(CONFORMANCE)

demo: env
	$(BIN)/dso demo

# Builds the documentation as a site in build/site. A broken link or a page missing from the navigation is an error. Needs neither
# the package nor the native library. `make docs-reference` writes the pages that are generated from the code, which a test compares.
DOCS := .venv-docs
DOCS_PACKAGES = $(shell sed -n '/^docs = \[/,/^\]/s/^ *"\(.*\)",$$/"\1"/p' pyproject.toml)

$(DOCS)/.installed: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet $(DOCS_PACKAGES)
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "build/site/index.html; with search: python3 -m http.server -d build/site"

docs-reference: env
	$(BIN)/python -m docs.generate

# The tests that use Transformers, on the oldest release that pyproject.toml allows; `make test` uses the newest. The other packages are
# those of .venv: the old release lies in a folder of its own, before them on Python's path. Two cases of a function, as releases
# differ in functions and not in values of parameters.
LOWEST := build/lowest
LOWEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
LOWEST_TESTS ?= tests/integration tests/models tests/test_article.py tests/test_optimized_model.py \
  tests/train/test_prepare.py tests/train/test_trainer.py tests/train/test_attention_function.py tests/train/checkpoints

$(LOWEST)/.installed: $(VENV)/.created pyproject.toml
	rm -rf $(LOWEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(LOWEST) "transformers~=$(LOWEST_TRANSFORMERS).0"
	touch $@

test-lowest: env $(LOWEST)/.installed
	PYTHONPATH=$(abspath $(LOWEST)) $(PYTEST) -q --few 2 $(LOWEST_TESTS) $(PYTEST_ARGS)

# Other projects' packages on optimized models, in a separate environment: they are large and slow down every start.
INTEROP := .venv-interop

$(INTEROP)/.installed: $(WHEELS)/.built
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --upgrade pip
	$(INTEROP)/bin/python -m pip install --quiet "$$(ls $(WHEELS)/*.whl)[dev,interop]"
	$(INTEROP)/bin/python -m pip install --quiet --no-deps --force-reinstall $(WHEELS)/*.whl
	touch $@

interop-env: $(INTEROP)/.installed

# Ray's tests one after another, and the others beside them: see tests/interop/conftest.py.
test-interop: interop-env
	$(ONE_THREAD) DSO_INTEROP=1 PYTHONDONTWRITEBYTECODE= $(INTEROP)/bin/python -m pytest -q -n $(WORKERS) --dist loadgroup tests/interop $(PYTEST_ARGS)

# The kernels of backend `cuda` in Triton's interpreter. Needs no card. Triton decides when it is imported whether it interprets.
CUDA_TESTS ?= tests/backends/cuda
test-cuda-interpreter: env
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" --deselect tests/backends/cuda/test_compiled.py $(CUDA_TESTS) $(PYTEST_ARGS)

# The kernels of backend `cuda` on this machine's card: whole models beside the reference, and what only a card can show.
GPU_TESTS := tests/backends/cuda/test_on_card.py tests/backends/cuda/test_families.py tests/backends/cuda/test_plan.py \
  tests/backends/cuda/test_deepseek.py tests/backends/cuda/test_deepseek_v4.py tests/backends/cuda/test_pictures.py \
  tests/backends/cuda/test_compiled.py
test-gpu: env
	$(BIN)/python -m pip install --quiet "$$(ls $(WHEELS)/*.whl)[cuda]"
	DSO_TEST_GPU=1 $(ONE_THREAD) $(BIN)/python -m pytest -m "" $(GPU_TESTS) $(PYTEST_ARGS)

# This card against Transformers, and vLLM and SGLang where they are installed in .venv: benchmarks/results/gpu-CARD.json.
GPU_MODEL ?= deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
BENCH_ARGS ?=
bench-gpu: env
	$(BIN)/python -m pip install --quiet "$$(ls $(WHEELS)/*.whl)[cuda]"
	$(BIN)/python -m benchmarks.gpu $(GPU_MODEL) $(BENCH_ARGS)

# The server tests of vLLM and llama.cpp against `dso serve`. PEERS: suites and options, such as PEERS="vllm --file test_chat".
PEERS ?=
test-peers: $(INTEROP)/.installed
	PYTHONPATH=tests $(INTEROP)/bin/python -m peers.run $(PEERS)

# Measures ratios in alternating runs; nothing else may run meanwhile. BENCH selects rows: make bench BENCH="smol-decode spine-smol".
# The first run also creates the models and the other engines' environments, in the user's cache directory.
BENCH ?=
bench: env
	$(BIN)/python -m benchmarks.run $(BENCH)
	$(BIN)/python -m benchmarks.tables

# Compares this tree with an earlier commit, in alternating runs: make bench-commits BEFORE=HEAD~5 BENCH="smol-decode serve-16".
BEFORE ?= HEAD~1
bench-commits: env
	$(BIN)/python -m benchmarks.commits $(BEFORE) $(BENCH)

# Compares the server with another that is alive at the same time, batch by batch. OTHER: "engine" (ours without HTTP) or a commit.
OTHER ?= engine
bench-serving: env
	$(BIN)/python -m benchmarks.serving_batches $(OTHER)

# Compares training with Transformers' Trainer: time per step, memory and loss.
bench-train: env
	$(BIN)/python -m benchmarks.training $(BENCH)
	$(BIN)/python -m benchmarks.tables

# On SmolLM2: for half an hour, a hostile client next to 16 honest ones, whose answers must stay correct; for ten minutes, 64 clients
# of all kinds, without errors or leaks; and a training run that is killed 200 times.
SOAK_SECONDS ?= 1800
MIXED_SECONDS ?= 600
SOAK_KILLS ?= 200
soak: env
	$(BIN)/python -m benchmarks.soak --seconds $(SOAK_SECONDS)
	$(BIN)/python -m benchmarks.attacks
	$(BIN)/python -m benchmarks.mixed_soak --seconds $(MIXED_SECONDS)
	$(BIN)/python -m benchmarks.train_soak --rounds $(SOAK_KILLS)

quality: env
	$(BIN)/python -m benchmarks.quality --out benchmarks/results/quality.json
	$(BIN)/python -m benchmarks.auto

PYTHON_SOURCES := src tests benchmarks examples docs build_tools .ci
NATIVE_SOURCES := $(shell find native tests/support \( -name '*.hpp' -o -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.c' \))

format: env
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

lint: env docs
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy -p benchmarks
	$(BIN)/python .ci/check_commits.py
	! test -x $(BIN)/hadolint || $(BIN)/hadolint Dockerfile Dockerfile.cuda
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github

include native/native.mk

# Ten minutes of coverage-guided fuzzing for each target of tests/fuzz/targets.py; a million mutated headers of safetensors, GGUF
# and packed files; and for each operation of the server a thousand valid and a thousand invalid requests generated from its schema.
# The test suite replays the corpora and runs a short round of the rest. FUZZ_TARGET=schema fuzzes a single target.
FUZZ_SECONDS ?= 600
FUZZ_TARGET ?= all
FUZZ_INPUTS ?= 1000000
FUZZ_REQUESTS ?= 1000
fuzz: env
	$(BIN)/python -m pip install --quiet "$$(ls $(WHEELS)/*.whl)[fuzz]"
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ_TARGET) --seconds $(FUZZ_SECONDS)
	$(BIN)/python tests/fuzz/fuzz_headers.py --inputs $(FUZZ_INPUTS)
	DSO_SCHEMA_EXAMPLES=$(FUZZ_REQUESTS) $(BIN)/python -m pytest -m "" tests/server/test_schema_fuzz.py

clean:
	rm -rf $(VENV) $(INTEROP) $(DOCS) build dist .pytest_cache .mypy_cache .ruff_cache
