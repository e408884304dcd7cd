# make test | test-all | test-interop | test-conformance | demo | docs | lint | bench | bench-train | bench-commits | soak | quality | test-lowest | test-native | test-native-tsan | native | fuzz | wheel | page-assets | clean: each works alone, from a fresh clone.
# Everything goes into .venv and build/. PYTHON picks the interpreter that .venv is made from.
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

# What the wheel is made of. A change in any of these builds and installs it anew.
SOURCES := pyproject.toml README.md LICENSE $(wildcard CMakeLists.txt) \
  $(shell find native src build_tools -type f -not -name '*.pyc' -not -path '*/_native/*')

.PHONY: help env test test-all test-wide test-lowest test-interop test-conformance demo docs docs-reference format lint bench bench-train bench-commits soak quality wheel page-assets fuzz clean

help:
	@sed -n '1,2s/^# //p' Makefile

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# DSO_REQUIRE_NATIVE: a native part that does not compile is an error here, not a fallback.
$(WHEELS)/.built: $(VENV)/.created $(SOURCES)
	rm -rf $(WHEELS) && mkdir -p $(WHEELS)
	-$(BIN)/python build_tools/page_assets.py
	DSO_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) .
	touch $@

# The built wheel, not an editable tree: the tests see what a user gets.
$(VENV)/.installed: $(WHEELS)/.built
	$(BIN)/python -m pip install --quiet "$$(ls $(WHEELS)/*.whl)[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall $(WHEELS)/*.whl
	touch $@

# The chat page's libraries, for a server that runs on the source tree; `make wheel` fetches them too.
page-assets: $(VENV)/.created
	$(BIN)/python build_tools/page_assets.py

env: $(VENV)/.installed

wheel: $(WHEELS)/.built
	@ls $(WHEELS)/*.whl

# worksteal: a worker gets tests that follow one another, so that what a file's tests share is made once.
# OMP_NUM_THREADS: torch in two workers with two threads each spends most of its time waiting for a processor.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: env
	DSO_WHEEL=$$(ls $(WHEELS)/*.whl) $(PYTEST) $(TESTS) $(PYTEST_ARGS)

# Everything else that CI runs. What `make test` runs is not run again.
test-all: test-native test-lowest test-interop test-conformance test-wide

test-wide: env
	DSO_WHEEL=$$(ls $(WHEELS)/*.whl) $(PYTEST) -m wide $(TESTS) $(PYTEST_ARGS)

# Transformers' own tests on optimised models beside plain ones; CONFORMANCE takes families and options (--all: the slow ones too).
CONFORMANCE ?=
test-conformance: env
	PYTHONPATH=tests $(BIN)/python -m conformance.run $(CONFORMANCE)

demo: env
	$(BIN)/dso demo

# The documentation as a site in build/site; a broken link or a page outside the navigation is an error. It needs neither the
# package nor the native library. `make docs-reference` writes the pages that are generated from the code, which a test compares.
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

# What touches Transformers, on the lowest release that pyproject.toml admits; `make test` has the newest.
LOWEST := .venv-lowest
LOWEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
LOWEST_TESTS ?= tests/integration tests/models tests/test_article.py tests/test_optimised_model.py \
  tests/train/test_prepare.py tests/train/test_trainer.py tests/train/test_attention_function.py tests/train/checkpoints

$(LOWEST)/.installed: $(WHEELS)/.built
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet "$$(ls $(WHEELS)/*.whl)[dev]" "transformers~=$(LOWEST_TRANSFORMERS).0"
	$(LOWEST)/bin/python -m pip install --quiet --no-deps --force-reinstall $(WHEELS)/*.whl
	touch $@

test-lowest: $(LOWEST)/.installed
	$(ONE_THREAD) $(LOWEST)/bin/python -m pytest -q -m "not slow" -n $(WORKERS) $(LOWEST_TESTS) $(PYTEST_ARGS)

# Packages of other projects on optimised models, in an environment of their own: they are large, and slow every start.
INTEROP := .venv-interop

$(INTEROP)/.installed: $(WHEELS)/.built
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet "$$(ls $(WHEELS)/*.whl)[dev,interop]"
	$(INTEROP)/bin/python -m pip install --quiet --no-deps --force-reinstall $(WHEELS)/*.whl
	touch $@

test-interop: $(INTEROP)/.installed
	$(ONE_THREAD) DSO_INTEROP=1 $(INTEROP)/bin/python -m pytest -q tests/interop $(PYTEST_ARGS)

# Ratios in alternating runs; nothing else may run meanwhile. BENCH picks rows: make bench BENCH="smol-decode spine-smol".
# The first run also makes models and the other engines' environments, in the user's cache directory.
BENCH ?=
bench: env
	$(BIN)/python -m benchmarks.run $(BENCH)
	$(BIN)/python -m benchmarks.tables

# This tree beside an earlier commit, in turns: make bench-commits BEFORE=HEAD~5 BENCH="smol-decode serve-16".
BEFORE ?= HEAD~1
bench-commits: env
	$(BIN)/python -m benchmarks.commits $(BEFORE) $(BENCH)

# A step of training beside Transformers' Trainer, memory, and what the loss loses.
bench-train: env
	$(BIN)/python -m benchmarks.training $(BENCH)
	$(BIN)/python -m benchmarks.tables

# On SmolLM2: a hostile client beside 16 honest ones for half an hour, whose answers stay right; 64 clients of all kinds for ten
# minutes; no error, nothing left behind. And training is killed 200 times.
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

include native/native.mk

# Ten minutes of coverage-guided fuzzing for each target of tests/fuzz/targets.py; a million mutated headers of safetensors, GGUF
# and packed files; and for each operation of the server a thousand valid and a thousand invalid requests made from its schema.
# The suite replays the corpora, and runs a short round of the others. FUZZ_TARGET=schema fuzzes one target.
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
	rm -rf $(VENV) $(LOWEST) $(INTEROP) $(DOCS) build dist .pytest_cache .mypy_cache .ruff_cache
