"""The machine's CPUs, and which of them share a core, an L3 cache or a memory node; or a machine described in a file.

`DSO_TOPOLOGY` names such a file, to try what the library would do on another machine: threads are then placed as on it, but
nothing is bound to CPUs, and what would be asked of the system about memory is only recorded. The file is JSON:

    {"nodes": [
        {"package": 0, "l3_groups": [{"cores": 8, "threads_per_core": 2}, {"cores": 8, "threads_per_core": 2}]},
        {"package": 1, "l3_groups": [{"cores": 16, "capacity": 512}]}
    ]}

A memory node has one or more groups of cores that share an L3 cache. `package` (default: the node's number),
`threads_per_core` (default 1) and `capacity` (relative speed from 1 to 1024, default 1024) may be left out. CPUs are numbered
in this order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError

MOST_CPUS = 4096
FULL_CAPACITY = 1024


class Cpu(NamedTuple):
    """A CPU: the system's number of it and of its memory node, numbers of the core, L3 group and package that it shares with
    others, and its core's relative speed (1024: the fastest)."""

    number: int
    core: int
    l3: int
    node: int
    package: int
    capacity: int


def read_topology(path: str) -> list[Cpu]:
    """The CPUs that a file describes.

    Raises:
        ConfigError: the file cannot be read, or a field is invalid; the message names the field.
    """
    try:
        described = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"DSO_TOPOLOGY={path}: the file cannot be read ({error}); correct or unset it") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"DSO_TOPOLOGY={path}: the file is not JSON ({error}); correct or unset it") from error
    try:
        return list(_cpus(described))
    except _InvalidFieldError as error:
        raise ConfigError(f"DSO_TOPOLOGY={path}: {error}; correct it, or unset DSO_TOPOLOGY") from error


def describe(cpus: list[Cpu], nodes: list[int], source: str) -> dict[str, Any]:
    """Counts of what the CPUs share, for `dso info`.

    Args:
        cpus: of a machine.
        nodes: the number of threads on each memory node.
        source: where `cpus` are from.
    """
    counts: dict[str, Any] = {
        "packages": len({c.package for c in cpus}),
        "memory nodes": len({c.node for c in cpus}),
        "L3 groups": len({c.l3 for c in cpus}),
        "cores": len({c.core for c in cpus}),
        "CPUs": len(cpus),
    }
    if len({c.capacity for c in cpus}) > 1:
        fastest = max(c.capacity for c in cpus)
        counts["fast cores"] = len({c.core for c in cpus if c.capacity == fastest})
    if len(nodes) > 1:
        counts["threads per memory node"] = nodes
    return {**counts, "source": source}


def cpus_of_rank(cpus: Sequence[Cpu], rank: int, ranks: int) -> list[Cpu] | None:
    """The CPUs of one of several processes that divide a model and compute at the same time: those of its memory nodes, or its
    share of the cores of a node.

    Args:
        cpus: of the machine.
        rank, ranks: the process's number, and how many there are.

    Returns:
        None: any. There is one memory node, or the nodes cannot be divided evenly among the processes, or their cores.
    """
    nodes = sorted({cpu.node for cpu in cpus})
    if len(nodes) == 1:
        return None
    if len(nodes) % ranks == 0:
        each = len(nodes) // ranks
        own = nodes[rank * each : (rank + 1) * each]
        return [cpu for cpu in cpus if cpu.node in own]
    each = ranks // len(nodes)  # processes of a node
    cores = [sorted({cpu.core for cpu in cpus if cpu.node == node}) for node in nodes]
    if ranks % len(nodes) or min(map(len, cores)) < each:
        return None
    of_node = cores[rank // each]
    begin, end = (len(of_node) * n // each for n in (rank % each, rank % each + 1))
    return [cpu for cpu in cpus if cpu.core in of_node[begin:end]]


class _InvalidFieldError(Exception):
    pass


def _cpus(described: Any) -> Iterator[Cpu]:
    cpu = core = group_number = 0
    for i, node in enumerate(_list(_object(described, "the file", {"nodes"}), "nodes", "nodes")):
        at = f"nodes[{i}]"
        _object(node, at, {"package", "l3_groups"})
        package = _integer(node, "package", at, 0, MOST_CPUS, i)
        for j, group in enumerate(_list(node, "l3_groups", f"{at}.l3_groups")):
            inside = f"{at}.l3_groups[{j}]"
            _object(group, inside, {"cores", "threads_per_core", "capacity"})
            cores = _integer(group, "cores", inside, 1, MOST_CPUS)
            threads = _integer(group, "threads_per_core", inside, 1, 8, 1)
            capacity = _integer(group, "capacity", inside, 1, FULL_CAPACITY, FULL_CAPACITY)
            if cpu + cores * threads > MOST_CPUS:
                raise _InvalidFieldError(f"{inside}.cores is {cores}, which makes more than {MOST_CPUS} CPUs in all")
            for _ in range(cores):
                for _ in range(threads):
                    yield Cpu(cpu, core, group_number, i, package, capacity)
                    cpu += 1
                core += 1
            group_number += 1


def _object(value: Any, name: str, fields: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _InvalidFieldError(f"{name} must be an object, is {value!r:.60}")
    for field in value:
        if field not in fields:
            raise _InvalidFieldError(f"{name} has the unknown field {field!r}; it may have {', '.join(sorted(fields))}")
    return value


def _list(value: dict[str, Any], field: str, name: str) -> list[Any]:
    items = value.get(field)
    if not isinstance(items, list) or not items:
        raise _InvalidFieldError(f"{name} must be a list of at least one object, is {items!r:.60}")
    return items


def _integer(value: dict[str, Any], field: str, name: str, low: int, high: int, default: int | None = None) -> int:
    number = value.get(field, default)
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise _InvalidFieldError(f"{name}.{field} must be a whole number from {low} to {high}, is {number!r:.60}")
    return number
