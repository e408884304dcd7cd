# native:       builds the library and copies it into the source tree, for development without installing.
# test-native:  builds with AddressSanitizer and UndefinedBehaviorSanitizer and runs the native tests; then runs them on the
#               optimized build. GCC aligns no frames for stack-use-after-return for AVX-512 (its bug 110027). The sanitized build
#               has what this processor can run, and of the variants that have kernels in common only one: SANITIZED_ISAS= builds
#               all. It runs a third of the random cases (DSO_TEST_DIVISOR=1: all of them).
# test-arm:     cross-builds for ARM64 and runs the native tests under qemu-user, on five CPU models (ARM_MODELS: on some). Needs
#               Debian's g++-aarch64-linux-gnu and qemu-user. test-arm-short: the part of it that CI runs.
# test-arm-wheel: cross-builds the wheel for ARM64, and installs and runs it under qemu-user. Needs debootstrap, too.
# test-amx:     builds the kernels for AMX and runs the native tests that reach them: on this processor's tiles, else on emulated ones,
#               which need AVX-512 with VNNI and BF16; an error that names what is missing where neither runs.
# bench-amx:    measures them against vectors, and from how many tokens on they are faster: benchmarks/results/amx-CPU.json.
# test-windows: cross-builds for Windows on x86-64, all but AMX, checks what the DLL exports, and runs the native tests under Wine
#               (WINDOWS_TESTS: some). Needs Debian's clang (19 or newer), g++-mingw-w64-x86-64-posix and wine64.
# test-macos:   compiles and links the library and its native tests for macOS on ARM64 with zig (PyPI), and checks what the library
#               exports; runs nothing.
CMAKE ?= $(or $(shell command -v cmake),$(BIN)/cmake)
NATIVE_JOBS ?= $(shell nproc)
# The compiler by the name that wheels are built with: ccache tells g++ from c++, and would compile the kernels a second time.
AS_WHEELS := $(if $(shell command -v g++),CXX=$${CXX:-g++})

.PHONY: native test-native test-native-tsan test-native-long test-arm test-arm-short test-arm-wheel test-amx bench-amx test-windows test-macos

$(BIN)/cmake: $(VENV)/.created
	$(BIN)/python -m pip install --quiet cmake ninja

native: $(filter $(BIN)/cmake,$(CMAKE))
	$(AS_WHEELS) $(CMAKE) -S . -B build/native
	$(CMAKE) --build build/native --target dso -j $(NATIVE_JOBS)
	mkdir -p src/deepseek_optimizer/_native
	cp build/native/libdso.so src/deepseek_optimizer/_native/.libdso.so.new
	mv src/deepseek_optimizer/_native/.libdso.so.new src/deepseek_optimizer/_native/libdso.so

CPU_HAS = $(shell grep -qsw $(1) /proc/cpuinfo && echo yes)
TILE_ISAS = amx_emulated$(if $(call CPU_HAS,amx_tile),;amx)
SANITIZED_ISAS ?= $(if $(call CPU_HAS,avx512_bf16),avx2;avx512_bf16;$(TILE_ISAS),$(if $(call CPU_HAS,avx512f),,$(if $(call CPU_HAS,avx2),avx2)))
test-native: $(filter $(BIN)/cmake,$(CMAKE))
	$(CMAKE) -S . -B build/native-sanitized -DDSO_TESTS=ON -DDSO_SANITIZE=ON "-DDSO_ISAS=$(SANITIZED_ISAS)"
	$(CMAKE) --build build/native-sanitized -j $(NATIVE_JOBS)
	cd build/native-sanitized && DSO_TEST_DIVISOR=$${DSO_TEST_DIVISOR:-3} ASAN_OPTIONS=detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 ctest -j $(NATIVE_JOBS) --output-on-failure --timeout 600
	$(AS_WHEELS) $(CMAKE) -S . -B build/native -DDSO_TESTS=ON
	$(CMAKE) --build build/native -j $(NATIVE_JOBS)
	cd build/native && ctest -j $(NATIVE_JOBS) --output-on-failure

# The thread pool and plans that several threads share, under ThreadSanitizer.
TSAN_TESTS ?= test_pool test_threads test_red_zones test_plan test_nodes test_many_threads test_process_group test_socket_group \
	test_stage_decode
test-native-tsan: $(filter $(BIN)/cmake,$(CMAKE))
	$(CMAKE) -S . -B build/native-tsan -DDSO_TESTS=ON -DDSO_SANITIZE=thread
	$(CMAKE) --build build/native-tsan -j $(NATIVE_JOBS) --target $(TSAN_TESTS)
	cd build/native-tsan && TSAN_OPTIONS=die_after_fork=0 ctest --output-on-failure --timeout 900 -R '^($(subst $(eval ) ,|,$(strip $(TSAN_TESTS))))$$'

# 10,000 steps of 128 threads, on one memory node and on four: half a minute on two cores.
test-native-long: $(filter $(BIN)/cmake,$(CMAKE))
	$(AS_WHEELS) $(CMAKE) -S . -B build/native -DDSO_TESTS=ON
	$(CMAKE) --build build/native -j $(NATIVE_JOBS) --target test_many_threads
	cd build/native && ctest -C long --output-on-failure -R '^many_threads_long$$'

AMX_TESTS := test_isa test_lanes test_linear_int test_linear_float test_plan test_experts test_mla test_index test_train_product test_train_attention
AMX_ISAS := avx2;avx512_bf16;amx;amx_emulated
test-amx: $(filter $(BIN)/cmake,$(CMAKE))
	$(CMAKE) -S . -B build/native-amx -DDSO_TESTS=ON "-DDSO_ISAS=$(AMX_ISAS)"
	$(CMAKE) --build build/native-amx -j $(NATIVE_JOBS) --target test_amx
	build/native-amx/native/tests/test_amx --require
	$(CMAKE) --build build/native-amx -j $(NATIVE_JOBS) --target bench_amx
	build/native-amx/native/tests/bench_amx amx-emulated 256 256 0 >/dev/null  # that all its cases run
	$(CMAKE) --build build/native-amx -j $(NATIVE_JOBS) --target $(AMX_TESTS)
	cd build/native-amx && ctest --output-on-failure -j $(NATIVE_JOBS) -R '^($(subst $(eval ) ,|,$(strip $(AMX_TESTS))))$$'

bench-amx: env $(filter $(BIN)/cmake,$(CMAKE))
	CMAKE=$(CMAKE) $(BIN)/python -m benchmarks.amx $(BENCH_ARGS)

ARM_MODELS ?=
ARM := -DDSO_TESTS=ON -DCMAKE_TOOLCHAIN_FILE=build_tools/cmake/aarch64-linux-gnu.cmake
.PHONY: arm-tools
arm-tools:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { echo "testing ARM64 needs Debian's g++-aarch64-linux-gnu and qemu-user: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }

test-arm: arm-tools $(filter $(BIN)/cmake,$(CMAKE))
	$(CMAKE) -S . -B build/native-arm $(ARM) -DDSO_OPTIMIZE=-O2
	$(CMAKE) --build build/native-arm -j $(NATIVE_JOBS)
	python3 native/tests/run_arm.py build/native-arm $(ARM_MODELS)

# For CI, where nothing is cached: most of its time is the compiler's. Precompiled headers instead of ccache, and -O1.
ARM_SHORT := test_isa test_lanes test_linear_int
test-arm-short: arm-tools $(filter $(BIN)/cmake,$(CMAKE))
	$(CMAKE) -S . -B build/native-arm-short $(ARM) -DDSO_OPTIMIZE=-O1 -DDSO_COMPILER_CACHE=OFF
	$(CMAKE) --build build/native-arm-short -j $(NATIVE_JOBS) --target $(ARM_SHORT)
	python3 native/tests/run_arm.py build/native-arm-short --short $(ARM_MODELS)

# The wheel for ARM64, cross-built by the same backend, its own pip and an answer of SmolLM2 in the emulator. ARM_MODEL: SmolLM2.
ARM_WHEELS := build/wheels-arm
ARM_MODEL ?= $$($(BIN)/python -c 'from deepseek_optimizer.bench import smollm2; print(smollm2.fetch())')
$(ARM_WHEELS)/.built: $(VENV)/.created $(SOURCES)
	@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "the wheel for ARM64 needs g++-aarch64-linux-gnu"; exit 1; }
	rm -rf $(ARM_WHEELS) && mkdir -p $(ARM_WHEELS)
	_PYTHON_HOST_PLATFORM=linux-aarch64 CMAKE_TOOLCHAIN_FILE=$(abspath build_tools/cmake/aarch64-linux-gnu.cmake) DSO_REQUIRE_NATIVE=1 \
	  $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(ARM_WHEELS) .
	touch $@

test-arm-wheel: env $(ARM_WHEELS)/.built
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python build_tools/check_arm_wheel.py $(ARM_WHEELS)/*.whl --cpu neoverse-n1 --model $(ARM_MODEL)

WINDOWS_TESTS ?= .
WINDOWS_ISAS := avx2;avx2_vnni;avx512;avx512_vnni;avx512_bf16
WINE := WINEDEBUG=-all WINEPREFIX=$(abspath build/wine)
test-windows: $(filter $(BIN)/cmake,$(CMAKE))
	$(CMAKE) -S . -B build/native-windows -DDSO_TESTS=ON -DDSO_OPTIMIZE=-O2 "-DDSO_ISAS=$(WINDOWS_ISAS)" \
	  -DCMAKE_TOOLCHAIN_FILE=build_tools/cmake/x86_64-w64-mingw32.cmake
	$(CMAKE) --build build/native-windows -j $(NATIVE_JOBS)
	python3 native/tests/check_exports.py build/native-windows/libdso.dll
	cd build/native-windows && $(WINE) DSO_TEST_DIVISOR=20 ctest --output-on-failure --timeout 900 --no-tests=error -R '$(WINDOWS_TESTS)'

test-macos: $(filter $(BIN)/cmake,$(CMAKE)) $(VENV)/.created
	$(BIN)/python -m pip install --quiet ziglang
	$(CMAKE) -S . -B build/native-macos -DDSO_TESTS=ON -DDSO_OPTIMIZE=-O2 -DCMAKE_TOOLCHAIN_FILE=build_tools/cmake/arm64-apple-macos.cmake \
	  -DDSO_ZIG=$$($(BIN)/python -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')/zig
	$(CMAKE) --build build/native-macos -j $(NATIVE_JOBS)
	python3 native/tests/check_exports.py build/native-macos/libdso.dylib
