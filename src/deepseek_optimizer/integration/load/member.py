"""A process of those that run a model together, while it loads its part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection

from ...backends.cpu.environment import memory_nodes, topology_file
from ...backends.cpu.group import Group
from ...backends.cpu.native import machine_cpus
from ...backends.cpu.topology import cpus_of_rank
from ...backends.parallel import Leader, Links, OwnPart, RankBackend, StageBackend
from ...checkpoint.load import Part
from ...config import DeepSeekConfig
from ...graph.parallel.layer_shares import Machine
from ...graph.parallel.pipeline import Stage
from ..bind.runtime import Runtime
from ..generation.fingerprint import part_fingerprint


@dataclass(frozen=True)
class Member:
    """A process of a group, while it loads its part.

    Attributes:
        rank: its number.
        threads: number of threads of its backend.
        group: unless they are a pipeline, its place in the group.
        leader: of rank 0 the other processes.
        link: of the other ranks, the connection to rank 0.
        one_host: whether all processes are on one machine, where rank 0 has started the others.
        cpus: those that it runs on; None: all that it may use.
        machines: of a pipeline on several machines, what each of them has.
    """

    rank: int
    threads: int
    group: Group | None = None
    leader: Leader | Links | None = None
    link: Connection | None = None
    one_host: bool = True
    cpus: list[int] | None = None
    machines: list[Machine] | None = None

    def backend(self, settings: DeepSeekConfig, share: Share) -> RankBackend | StageBackend:
        """The backend that runs this process's part."""
        if share.stages:
            links = self.leader if isinstance(self.leader, Links) else None
            return StageBackend(settings.isa, self.threads, share.stages, self.rank, self.one_host, links)
        assert self.group is not None
        leader = self.leader if isinstance(self.leader, Leader) else None
        return RankBackend(settings.isa, self.threads, self.group, settings.parallel, leader)


@dataclass(frozen=True)
class Share:
    """What a rank has of a model.

    Attributes:
        parts: the parts of tensors that it does not have as a whole, by name.
        names: the tensors that it has; None: all.
        stages: with a pipeline, those of all processes.
    """

    parts: Mapping[str, Part]
    names: list[str] | None = None
    stages: list[Stage] = field(default_factory=list)


def own_part(runtime: Runtime) -> OwnPart:
    """What the process of a runtime has of a divided model, for the messages of the first process."""
    return OwnPart(runtime.graph, partial(part_fingerprint, runtime), partial(runtime.compile, runtime.graph))


def cpus_of_process(rank: int, ranks: int, threads: int) -> list[int] | None:
    """The CPUs of a process of those that compute at the same time, unless it has more threads than they have cores; see
    `cpus_of_rank`. Raises ConfigError for an invalid DSO_NUMA."""
    if memory_nodes() == "off" or topology_file() is not None:  # of another machine: nothing is bound
        return None
    own = cpus_of_rank(machine_cpus(), rank, ranks)
    if own is None or threads > len({cpu.core for cpu in own}):
        return None
    return [cpu.number for cpu in own]
