"""CPU features: which of them are used, and why the others are not."""

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
    "asimd": "neon", "asimddp": "neon-dotprod", "i8mm": "neon-i8mm", "bf16": "neon-i8mm",
}  # fmt: skip
# Variant -> the one it extends, whose features it also uses.
UPON = {
    "avx2-vnni": "avx2", "avx512": "avx2", "avx512-vnni": "avx512", "avx512-bf16": "avx512-vnni", "amx": "avx512-bf16",
    "neon-dotprod": "neon", "neon-i8mm": "neon-dotprod",
}  # fmt: skip
# Useful for matrix products, but no kernel uses them yet.
WITHOUT_KERNELS = ("avx_vnni_int8", "avx512_fp16", "avx512_vbmi", "amx_fp16", "amx_complex", "sve", "sve2", "sme")


def first_used() -> dict[str, str]:
    """`FIRST_USED` of this processor: the features of its variants."""
    from ...backends.cpu import native

    return {name: variant for name, variant in FIRST_USED.items() if variant in native.isa_names()}


def why_not(isa: str) -> str | None:
    """Why an ISA variant cannot run here; None if it can."""
    from ...backends.cpu import native

    try:
        native.Context(isa, 1)
    except BackendError as error:
        return str(error)
    return None


def check(case: Case) -> Iterator[Finding]:
    """Compares the selected ISA with the best possible one, and the CPU's features with those the system lets programs use."""
    from ...backends.cpu import CpuBackend, native, unavailable_reason
    from ...backends.cpu.environment import forced_isa

    if unavailable_reason() is not None:
        return  # reported by the check of the native build
    best = native.Context(None, 1).isa
    forced, setting = case.fields.get("isa"), "isa"
    if forced is None:
        forced, setting = forced_isa(), "DSO_ISA"
    try:
        isa = CpuBackend(isa=forced).isa if forced else best
    except BackendError as error:
        fix = f"remove the setting {setting}: {best} can run"
        yield Finding(NAME, "error", f"{setting}={forced} cannot run here", str(error), fix, {"best": best})
        return
    here = set(native.cpu_description()["features"])
    flags = set(_flags(case))
    used = {name: _use(name, isa, here, flags) for name in first_used()}
    used |= {name: "no kernel here uses it" for name in WITHOUT_KERNELS if name in flags}
    facts = {"isa": isa, "best": best, "features": used, "isas": {n: why_not(n) or "runs here" for n in native.isa_names()}}
    if isa != best:
        yield Finding(
            NAME, "warning", f"{isa} kernels run, though this CPU can run {best}", f"{setting}={forced} selects them",
            f"remove the setting {setting}", facts,
        )  # fmt: skip
    else:
        what = f"{isa} kernels run, the best of this build that the CPU and the system support"
        yield Finding(NAME, "ok", f"{what}; {_summary(used)}", facts=facts)
    if withheld := sorted(name for name in first_used() if name in flags and name not in here):
        yield Finding(
            NAME, "warning", f"this CPU has {', '.join(withheld)}, but programs may not use it",
            "the kernel or the hypervisor does not save these registers, or is too old to permit them (AMX needs Linux 5.16)",
            "update the kernel, or expose the feature to the virtual machine (CPU model: host)", {"withheld": withheld},
        )  # fmt: skip


def _summary(used: Mapping[str, str]) -> str:
    """Features grouped by how they are used."""
    by_use: dict[str, list[str]] = {}
    for name, use in used.items():
        by_use.setdefault(use, []).append(name)
    return "; ".join(f"{', '.join(names)}: {use}" for use, names in by_use.items())


def _flags(case: Case) -> list[str]:
    """The CPU's flags as Linux lists them."""
    for line in case.machine.read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):  # x86, ARM
            return line.partition(":")[2].split()
    return []


def _use(name: str, isa: str, here: set[str], flags: set[str]) -> str:
    variant, lineage = FIRST_USED[name], [isa]
    while lineage[-1] in UPON:
        lineage.append(UPON[lineage[-1]])
    if variant in lineage:
        return f"used by {isa}"
    if name not in here:
        return "disabled by the system" if name in flags else "not on this CPU"
    if name == "avx_vnni" and "avx512-vnni" in lineage:
        return f"not used: {isa} uses the wider avx512_vnni instead"
    return f"not used: {why_not(variant) or f'{isa} was selected'}"
