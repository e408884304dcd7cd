"""Runs the native tests of a cross-build for ARM64 under qemu-user, on five CPU models: `make test-arm`.

    python native/tests/run_arm.py build/native-arm [--short] [MODEL...]

All tests run on `max`, and on the other models those that depend on their instructions. With --short, for CI, the choice of the
instruction set runs on every model, and the rest of SHORT on some. qemu traps the instructions that a model lacks, and
`test_isa` checks that it does and that the best instruction set of the model is chosen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

# The instruction set that must be chosen on each model.
MODELS = {
    "cortex-a72": "neon",  # ARMv8.0: no dot products
    "cortex-a76": "neon-dotprod",
    "neoverse-n1": "neon-dotprod",
    "neoverse-v1": "neon-i8mm",  # with SVE of 256 bits
    "max": "neon-i8mm",
}
# The choice of the instruction set and the lanes on every model; integer products once per instruction set, and the other
# kernels without and (on `max`, where everything runs) with the instructions that change them.
EVERYWHERE = ("test_isa", "test_lanes")
PRODUCTS = (*EVERYWHERE, "test_linear_int")
KERNELS = (*PRODUCTS, "test_linear_float", "test_attention", "test_elementwise", "test_pack", "test_kv", "test_trellis")
TESTS = {"cortex-a72": KERNELS, "cortex-a76": PRODUCTS, "neoverse-n1": EVERYWHERE, "neoverse-v1": PRODUCTS, "max": ()}
# --short: the lanes without and with the instructions that change them, and the products of all instruction sets.
SHORT = {
    "cortex-a72": ("test_isa", "test_lanes"),
    "cortex-a76": ("test_isa",),
    "neoverse-n1": ("test_isa",),
    "neoverse-v1": ("test_isa",),
    "max": ("test_isa", "test_lanes", "test_linear_int"),
}
DIVISOR = "20"  # of the number of random cases: qemu runs vector code at a twentieth of the speed and less
SHORT_DIVISOR = "400"
JOBS = str(min(2, os.cpu_count() or 1))


def run(build: Path, model: str, short: bool) -> bool:
    """Runs the tests of a model, prints a line and, of failures, their output."""
    environment = os.environ | {"QEMU_CPU": model, "DSO_EXPECTED_ISA": MODELS[model]}
    environment["DSO_TEST_DIVISOR"] = SHORT_DIVISOR if short else DIVISOR
    command = ["ctest", "--output-on-failure", "-j", JOBS, "--timeout", "900", "--no-tests=error"]
    if tests := (SHORT if short else TESTS)[model]:
        command += ["-R", f"^({'|'.join(tests)})$"]
    start, before = time.monotonic(), os.times()
    done = subprocess.run(command, cwd=build, env=environment, capture_output=True, text=True)
    passed = next((line for line in done.stdout.splitlines() if "tests passed" in line), "no test ran")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    times = f"{time.monotonic() - start:.0f} s, {seconds:.0f} s of processor time"
    print(f"{model:12} {MODELS[model]:13} {passed} in {times}", flush=True)
    if done.returncode != 0:
        print(done.stdout, done.stderr, sep="\n", flush=True)
    return done.returncode == 0


def main() -> int:
    build, *models = (a for a in sys.argv[1:] if a != "--short")
    if unknown := [m for m in models if m not in MODELS]:
        print(f"unknown CPU model {', '.join(unknown)}; choose among {', '.join(MODELS)}", file=sys.stderr)
        return 2
    results = [run(Path(build), model, "--short" in sys.argv) for model in models or MODELS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
