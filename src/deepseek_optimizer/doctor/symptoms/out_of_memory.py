"""Out of memory: which processes use it, which limit is the tightest, and how much each remedy for a long context would need.
The memory needed with the current settings is reported by the check `memory`."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import Case
from ..finding import Finding
from ..memory_estimate import estimate_memory
from ..remedies import gb, remedies
from .base import Symptom

NAME = "out-of-memory"
_BEYOND = {  # kind of limit -> what happens beyond it, and the fix
    "cgroup": (
        "beyond a cgroup's limit the kernel kills the process", "raise it (docker run --memory, resources.limits.memory)"
    ),
    "reserved": ("beyond it, allocations fail", "raise it (ulimit -v unlimited, LimitAS=, LimitDATA=)"),
}  # fmt: skip
_LARGE = 0.1  # of the machine's memory: processes that use more are reported


def measure(case: Case) -> Iterator[Finding]:
    """Finds limits below the machine's memory, and other processes that use much of it."""
    machine, limit = case.machine, case.machine.memory.tightest
    whole = next((one for one in machine.memory.limits if one.kind == "machine"), limit)
    cgroups = [one.free for one in machine.memory.limits if one.kind == "cgroup"]
    facts = {"available": whole.free, "total": whole.total, "cgroup_left": min(cgroups, default=None), "free": limit.free}
    if limit.kind in _BEYOND:
        yield Finding(NAME, "warning", f"{limit}; this machine has {whole.free / 1e9:.2f} GB free", *_BEYOND[limit.kind], facts)
    if machine.read("/proc/sys/vm/overcommit_memory") == "2":
        yield Finding(
            NAME, "warning", "the kernel counts memory that is reserved but not used",
            "vm.overcommit_memory=2; the cache reserves its maximum size and uses it as it grows",
            "sysctl vm.overcommit_memory=0, or limit the cache with kv_cache_memory", facts,
        )  # fmt: skip
    for name, pid, resident in _large_processes(whole.total):
        yield Finding(
            NAME, "note", f"{name} (process {pid}) uses {resident / 1e9:.2f} GB", "it shares this machine's memory",
            "end it if it is not needed", {**facts, "process": name, "pid": pid, "bytes": resident},
        )  # fmt: skip
    if case.model is not None:
        yield from _predictions(case)


def _predictions(case: Case) -> Iterator[Finding]:
    """One finding per remedy if the context does not fit; none if it does, or if the weights alone do not."""
    needs = estimate_memory(case)
    context = case.context or case.graph.max_positions
    tokens = needs.held(context) * case.batch
    if tokens <= needs.max_tokens or needs.weights + needs.buffers > needs.free:
        return
    candidates = remedies(case, needs, context)
    first = next((remedy for remedy in candidates if remedy.fits), None)
    for remedy in candidates:
        fits = "which fits" if remedy.fits else "which does not fit"
        yield Finding(
            NAME, "note", f"{case.batch} x {context} tokens with {remedy.name}: {gb(remedy.needed)}, {fits}", remedy.price,
            f"use {remedy.name}" if remedy is first else "", {**remedy.to_dict(), "free": needs.free, "context": context},
        )  # fmt: skip


def _large_processes(total: int) -> Iterator[tuple[str, int, int]]:
    import psutil

    me = psutil.Process().pid
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        info = process.info
        resident = info["memory_info"].rss if info["memory_info"] else 0
        if info["pid"] != me and total and resident > total * _LARGE:
            yield info["name"], info["pid"], resident


SYMPTOM = Symptom(measure, checks=("memory",), loads=False)
