"""What the CPU offers, whether each of it is used, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...errors import BackendError
from ..case import Case
from ..finding import Finding

NAME = "CPU features"

# Feature, as the native library names it -> the ISA variant whose kernels first use it.
FIRST_USED: Mapping[str, str] = {
    "avx2": "avx2", "fma": "avx2", "f16c": "avx2", "bmi2": "avx2", "avx_vnni": "avx2-vnni", "avx512f": "avx512",
    "avx512bw": "avx512", "avx512dq": "avx512", "avx512vl": "avx512", "avx512_vnni": "avx512-vnni",
    "avx512_bf16": "avx512-bf16", "amx_tile": "amx", "amx_int8": "amx", "amx_bf16": "amx",
}  # fmt: skip
# Variant -> the one it builds upon, whose features it uses too.
UPON = {"avx2-vnni": "avx2", "avx512": "avx2", "avx512-vnni": "avx512", "avx512-bf16": "avx512-vnni", "amx": "avx512-bf16"}
# Useful for matrix products, and no kernel here uses them yet.
WITHOUT_KERNELS = ("avx_vnni_int8", "avx512_fp16", "avx512_vbmi", "amx_fp16", "amx_complex")


def why_not(isa: str) -> str | None:
    """Why an ISA variant can't run here; None where it can."""
    from ...backends.cpu import native

    try:
        native.Context(isa, 1)
    except BackendError as error:
        return str(error)
    return None


def check(case: Case) -> Iterator[Finding]:
    """Compares what runs with the best that could, and the CPU's own flags with what the system lets programs use."""
    from ...backends.cpu import CpuBackend, native, unavailable_reason
    from ...backends.cpu.environment import forced_isa

    if unavailable_reason() is not None:
        return  # the check of the native build speaks of it
    best = native.Context(None, 1).isa
    forced, by = case.fields.get("isa"), "isa"
    if forced is None:
        forced, by = forced_isa(), "DSO_ISA"
    try:
        isa = CpuBackend(isa=forced).isa if forced else best
    except BackendError as error:
        fix = f"leave {by} out: {best} runs"
        yield Finding(NAME, "error", f"{by}={forced} cannot run here", str(error), fix, {"best": best})
        return
    here = set(native.cpu_description()["features"])
    flags = set(_flags(case))
    used = {name: _use(name, isa, here, flags) for name in FIRST_USED}
    used |= {name: "no kernel here uses it" for name in WITHOUT_KERNELS if name in flags}
    facts = {"isa": isa, "best": best, "features": used, "isas": {n: why_not(n) or "runs here" for n in native.isa_names()}}
    if isa != best:
        yield Finding(
            NAME, "warning", f"{isa} kernels run, though this CPU can run {best}", f"{by}={forced} asks for them",
            f"leave {by} out", facts,
        )  # fmt: skip
    else:
        what = f"{isa} kernels run, the best of this build that this CPU and system can run"
        yield Finding(NAME, "ok", f"{what}; {_summary(used)}", facts=facts)
    if withheld := sorted(name for name in FIRST_USED if name in flags and name not in here):
        yield Finding(
            NAME, "warning", f"this CPU has {', '.join(withheld)}, but programs may not use it",
            "the system or its hypervisor doesn't save these registers, or is too old to give leave (AMX: Linux 5.16)",
            "update the kernel, or expose the feature to the virtual machine (its CPU model: host)", {"withheld": withheld},
        )  # fmt: skip


def _summary(used: Mapping[str, str]) -> str:
    """Features with what is made of them, those of one fate together."""
    fates: dict[str, list[str]] = {}
    for name, fate in used.items():
        fates.setdefault(fate, []).append(name)
    return "; ".join(f"{', '.join(names)}: {fate}" for fate, names in fates.items())


def _flags(case: Case) -> list[str]:
    """The CPU's flags as Linux lists them."""
    for line in case.machine.read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return line.partition(":")[2].split()
    return []


def _use(name: str, isa: str, here: set[str], flags: set[str]) -> str:
    variant, lineage = FIRST_USED[name], [isa]
    while lineage[-1] in UPON:
        lineage.append(UPON[lineage[-1]])
    if variant in lineage:
        return f"used by {isa}"
    if name not in here:
        return "the system withholds it" if name in flags else "this CPU has none"
    if name == "avx_vnni" and "avx512-vnni" in lineage:
        return f"not used: {isa} has the same, twice as wide, in avx512_vnni"
    return f"not used: {why_not(variant) or f'{isa} was chosen'}"
