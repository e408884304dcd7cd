"""Out of memory: who has it, which limit is the tightest, and what each remedy for a long context would take. What the model
needs as it is set is the check `memory`."""

from __future__ import annotations

from collections.abc import Iterator

from ..budget import budget
from ..case import Case
from ..finding import Finding
from ..remedies import gb, remedies
from .base import Symptom

NAME = "out-of-memory"
_BEYOND = {  # kind of limit -> what happens beyond it, and what to do
    "cgroup": (
        "beyond a cgroup's limit the kernel kills the process", "raise it (docker run --memory, resources.limits.memory)"
    ),
    "reserved": ("beyond it memory is refused, reserved or used", "raise it (ulimit -v unlimited, LimitAS=, LimitDATA=)"),
}  # fmt: skip
_MUCH = 0.1  # of the machine's memory: what one other process must hold to be worth naming


def measure(case: Case) -> Iterator[Finding]:
    """Limits below what the machine has, and other processes that hold much of it."""
    machine, limit = case.machine, case.machine.memory.tightest
    has = next((one for one in machine.memory.limits if one.kind == "machine"), limit)
    cgroups = [one.free for one in machine.memory.limits if one.kind == "cgroup"]
    facts = {"available": has.free, "total": has.total, "cgroup_left": min(cgroups, default=None), "free": limit.free}
    if limit.kind in _BEYOND:
        yield Finding(NAME, "warning", f"{limit}; this machine has {has.free / 1e9:.2f} GB free", *_BEYOND[limit.kind], facts)
    if machine.read("/proc/sys/vm/overcommit_memory") == "2":
        yield Finding(
            NAME, "warning", "the kernel refuses memory that is reserved but not used",
            "vm.overcommit_memory=2; the cache reserves its whole range, and uses it as it grows",
            "sysctl vm.overcommit_memory=0, or bound the cache with kv_cache_memory", facts,
        )  # fmt: skip
    for name, pid, held in _large_processes(has.total):
        yield Finding(
            NAME, "note", f"{name} (process {pid}) holds {held / 1e9:.2f} GB", "it shares this machine's memory",
            "end it if it isn't needed", {**facts, "process": name, "pid": pid, "bytes": held},
        )  # fmt: skip
    if case.model is not None:
        yield from _predictions(case)


def _predictions(case: Case) -> Iterator[Finding]:
    """One for each remedy where the context does not fit; nothing where it does, or where the weights alone do not."""
    needs = budget(case)
    context = case.context or case.graph.max_positions
    tokens = needs.held(context) * case.batch
    if tokens <= needs.max_tokens or needs.weights + needs.buffers > needs.free:
        return
    found = remedies(case, needs, context)
    first = next((remedy for remedy in found if remedy.fits), None)
    for remedy in found:
        fits = "which fits" if remedy.fits else "which does not fit"
        yield Finding(
            NAME, "note", f"{case.batch} x {context} tokens with {remedy.name}: {gb(remedy.needed)}, {fits}", remedy.price,
            f"take {remedy.name}" if remedy is first else "", {**remedy.to_dict(), "free": needs.free, "context": context},
        )  # fmt: skip


def _large_processes(total: int) -> Iterator[tuple[str, int, int]]:
    import psutil

    me = psutil.Process().pid
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        info = process.info
        held = info["memory_info"].rss if info["memory_info"] else 0
        if info["pid"] != me and total and held > total * _MUCH:
            yield info["name"], info["pid"], held


SYMPTOM = Symptom(measure, checks=("memory",), loads=False)
