"""What depends on the processor or the system has its folders: `native/kernels/<isa>/` and `native/platform/`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[1] / "native"
PORTABLE = ("include", "runtime", "kernels/generic")

PROCESSOR = re.compile(
    r"immintrin|x86intrin|arm_neon|arm_sve|<cpuid\.h>"  # headers
    r"|\b_mm\d*_\w+|\b__m(128|256|512)|\b_cvt\w+_\w+|\b_MM_\w+|__rdtsc|__builtin_ia32|__get_cpuid"  # intrinsics of x86
    r"|\bv(ld|st)\d\w*_[fsu]\d+|\bv\w+q_[fsu]\d+|\b(float|u?int)\d+x\d+(x\d)?_t\b|__builtin_aarch64"  # and of ARM
    r"|__(x86_64|i386|aarch64|arm|AVX\w*|SSE\w*|FMA|F16C)__?\b|\b__ARM_\w+"  # macros
    r"|\b(__)?asm(__)?\s+volatile\s*\(\s*\"[^\"]"  # instructions; an empty one is a barrier for the compiler
)
SYSTEM = re.compile(r"#\s*include\s*<(sys/|linux/|mach/|unistd\.h|pthread\.h|sched\.h|signal\.h|fcntl\.h|windows\.h)")


def sources():
    for folder in PORTABLE:
        for path in sorted((NATIVE / folder).rglob("*")):
            if path.suffix in (".h", ".hpp", ".cpp", ".inl"):
                yield path
    yield from sorted((NATIVE / "kernels").glob("*.hpp"))


def found(pattern, text):
    return [f"{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line.split("//")[0])]


@pytest.mark.parametrize("pattern", [PROCESSOR, SYSTEM], ids=["processor", "system"])
def test_portable_sources_name_neither(pattern):
    all_found = {str(path.relative_to(NATIVE)): found(pattern, path.read_text("utf-8")) for path in sources()}
    assert len(all_found) > 100
    assert {path: lines for path, lines in all_found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "#include <immintrin.h>", "_mm_pause();", "__m256i x;", "_mm_prefetch((const char*)p, _MM_HINT_T0);",
        "f = _cvtsh_ss(h);", "const uint64_t start = __rdtsc();", "#ifdef __AVX512BF16__", "#ifdef __aarch64__",
        "float32x4_t x;", "x = vaddq_f32(a, b);",
        '__asm__ volatile("isb");', "#if defined(__ARM_FEATURE_DOTPROD)",
    ],
)  # fmt: skip
def test_what_belongs_to_a_processor_is_recognized(line):
    assert found(PROCESSOR, line)


@pytest.mark.parametrize("line", ["#include <sys/mman.h>", "#include <unistd.h>", "# include <linux/futex.h>"])
def test_what_belongs_to_a_system_is_recognized(line):
    assert found(SYSTEM, line)


@pytest.mark.parametrize(
    "line", ['asm volatile("" : "+r"(again));', "uint32_t t;", "// like _mm_pause()", "__builtin_prefetch(p);"]
)
def test_what_is_portable_is_not(line):
    assert not found(PROCESSOR, line) and not found(SYSTEM, line)
