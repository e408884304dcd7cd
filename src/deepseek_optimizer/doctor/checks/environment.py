"""Environment variables that slow down BLAS, OpenMP or torch, or pin threads to the wrong CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..case import Case
from ..finding import Finding, Severity
from ..machine import Machine

NAME = "environment"


@dataclass(frozen=True)
class Rule:
    """A variable, the values that do harm, and their effect."""

    variable: str
    harms: Callable[[str, Machine], bool]
    what: str
    cause: str
    fix: str
    severity: Severity = "warning"


def _more_than_cpus(value: str, machine: Machine) -> bool:
    first = value.split(",")[0].strip()  # OMP_NUM_THREADS may list one number per nesting level
    return first.isdigit() and int(first) > machine.usable_cpus


def _one_of(*values: str) -> Callable[[str, Machine], bool]:
    return lambda value, _machine: value.strip().lower() in values


def _none_of(*values: str) -> Callable[[str, Machine], bool]:
    return lambda value, _machine: value.strip().lower() not in values


def _at_least(limit: float) -> Callable[[str, Machine], bool]:
    def harms(value: str, _machine: Machine) -> bool:
        try:
            return float(value.lower().removesuffix("ms").replace("infinite", "inf").replace("infinity", "inf")) >= limit
        except ValueError:
            return False

    return harms


_SPINS = "idle threads keep spinning and take CPU time from the native thread pool"
_PINS = "libgomp binds the main thread when torch loads, and all later threads inherit its one CPU"

RULES = (
    *(
        Rule(
            f"{library}_NUM_THREADS", _more_than_cpus, "requests more threads than there are CPUs",
            "each parallel region waits for threads that have no CPU of their own", f"unset {library}_NUM_THREADS",
        )
        for library in ("OMP", "MKL", "OPENBLAS")
    ),
    Rule(
        "OMP_NUM_THREADS", lambda value, m: value.strip() == "1" and m.usable_cpus > 1, "limits torch to one thread",
        "everything that runs in torch (the reference backend, calls outside the plan, training) uses one CPU; the native "
        "backend is not affected", "unset OMP_NUM_THREADS if torch does the work", "note",
    ),
    Rule("OMP_WAIT_POLICY", _one_of("active"), "keeps OpenMP's threads spinning", _SPINS, "unset OMP_WAIT_POLICY"),
    Rule("GOMP_SPINCOUNT", _at_least(10_000_000), "keeps libgomp's threads spinning", _SPINS, "unset GOMP_SPINCOUNT"),
    Rule("KMP_BLOCKTIME", _at_least(201), "keeps Intel OpenMP's threads spinning beyond its 200 ms", _SPINS, "KMP_BLOCKTIME=0"),
    Rule("OMP_PROC_BIND", _none_of("false", ""), "binds threads to CPUs", _PINS, "unset OMP_PROC_BIND"),
    Rule("GOMP_CPU_AFFINITY", _none_of(""), "binds threads to CPUs", _PINS, "unset GOMP_CPU_AFFINITY"),
    Rule(
        "OPENBLAS_CORETYPE", _none_of(""), "restricts OpenBLAS to the kernels of one CPU type",
        "kernels for an older CPU use narrower vectors, so numpy's matrix products are slower", "unset OPENBLAS_CORETYPE",
    ),
    Rule(
        "MKL_ENABLE_INSTRUCTIONS", _none_of(""), "restricts MKL to fewer instructions than this CPU has",
        "torch's fp32 matrix products use narrower vectors", "unset MKL_ENABLE_INSTRUCTIONS",
    ),
    Rule(
        "MKL_DEBUG_CPU_TYPE", _none_of(""), "has no effect", "MKL has not read it since 2020.1", "unset MKL_DEBUG_CPU_TYPE",
        "note",
    ),
    Rule(
        "ATEN_CPU_CAPABILITY", _one_of("default", "avx2"), "restricts torch's kernels to fewer instructions than this CPU has",
        "it overrides torch's CPU detection", "unset ATEN_CPU_CAPABILITY",
    ),
    *(
        Rule(
            name, _none_of("", "all", "default"), "restricts oneDNN to fewer instructions than this CPU has",
            "torch's bf16 and int8 matrix products use narrower vectors, or no matrix unit", f"unset {name}",
        )
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    ),
    Rule(
        "MALLOC_PERTURB_", _none_of("", "0"), "makes malloc fill every allocation", "a debugging aid of glibc",
        "unset MALLOC_PERTURB_",
    ),
    Rule(
        "CUDA_LAUNCH_BLOCKING", _none_of("", "0"), "makes the CPU wait for every CUDA kernel", "a debugging aid of CUDA",
        "unset CUDA_LAUNCH_BLOCKING after debugging",
    ),
)  # fmt: skip


def check(case: Case) -> Iterator[Finding]:
    """Yields one finding per harmful variable in the environment."""
    harmful = False
    for rule in RULES:
        value = case.machine.environ.get(rule.variable)
        if value is not None and rule.harms(value, case.machine):
            harmful = True
            facts = {rule.variable: value, "usable_cpus": case.machine.usable_cpus}
            yield Finding(NAME, rule.severity, f"{rule.variable}={value} {rule.what}", rule.cause, rule.fix, facts)
    if not harmful:
        yield Finding(NAME, "ok", "no OpenMP, BLAS or torch setting slows computation down")
