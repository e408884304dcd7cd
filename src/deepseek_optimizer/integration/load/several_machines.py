"""This process among those of several machines, after they have found each other and told each other what they have."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from ...backends.cpu import CpuBackend
from ...backends.cpu.environment import forced_threads
from ...backends.cpu.group import ConnectedGroup
from ...backends.cpu.native import default_threads, shared_context
from ...backends.parallel import Leader, Links
from ...config import DeepSeekConfig
from ...errors import BackendError, ConfigError
from ...graph.parallel.layer_shares import Machine
from ...system.memory import free_memory, less_reserve
from .member import Member, cpus_of_process
from .mesh import connect_all
from .rendezvous import Place

_OF_MEMORY = 0.8  # share of a machine's free memory that weights may take; the rest is for caches and buffers
_READ_BYTES, _READ_SECONDS = 256 << 20, 0.3  # of measuring how fast memory is read


def stage_of_machines(place: Place, threads: int) -> Member:
    """The process of a stage of a pipeline.

    Raises:
        BackendError: not all processes can be reached, or one of them has ended.
    """
    own = Machine(int(_OF_MEMORY * max(0, less_reserve(free_memory().free))), _read_speed(threads))
    links = place.accept() if place.rank == 0 else [place.connect()]
    machines = _told(place.rank, links, own)
    if place.rank > 0:
        return Member(place.rank, threads, link=links[0], one_host=False, machines=machines)
    return Member(0, threads, leader=Links(links), one_host=False, machines=machines)


def rank_of_machines(place: Place, settings: DeepSeekConfig) -> Member:
    """The process of a rank of those that divide a model's matrices or experts. All use as many threads as the one with the
    fewest, and the same instructions: what each of them computes for itself must have the same bits.

    Raises:
        BackendError: not all processes can be reached, or one of them has ended.
        ConfigError: machines have different instruction sets.
    """
    index, count = place.here
    threads = settings.threads or forced_threads() or max(1, default_threads() // count)
    isa = CpuBackend(settings.isa, threads).isa
    links = place.accept() if place.rank == 0 else [place.connect()]
    facts = _told(place.rank, links, (isa, threads))
    for other, (others, _) in enumerate(facts):
        if others != facts[0][0]:
            for link in links:
                link.close()
            raise ConfigError(
                f"parallel: {settings.parallel} needs the same instructions on all machines, but rank 0 has {facts[0][0]}, and "
                f"rank {other} has {others}; set isa, or DSO_ISA, to one that all of them have"
            )
    threads = min(number for _, number in facts)
    by_rank = dict(enumerate(links, 1)) if place.rank == 0 else {0: links[0]}
    rows, alive = connect_all(place, by_rank)
    group = ConnectedGroup(place.rank, place.ranks, rows, alive, place.here)
    cpus = cpus_of_process(index, count, threads) if count > 1 else None
    if place.rank > 0:
        return Member(place.rank, threads, group, link=links[0], one_host=False, cpus=cpus)
    return Member(0, threads, group, Leader(group, (), links, cpus), one_host=False, cpus=cpus)


def _told(rank: int, links: list[Connection], own: Any) -> list[Any]:
    """What all processes say of themselves, by rank."""
    try:
        if rank > 0:
            links[0].send(own)
            told: list[Any] = links[0].recv()
            return told
        told = [own, *(link.recv() for link in links)]
        for link in links:
            link.send(told)
        return told
    except (EOFError, OSError) as error:
        for link in links:
            link.close()  # the others end too, instead of waiting
        raise BackendError(
            f"several machines: one of them ended before it had loaded its part of the model ({error})"
        ) from error


def _read_speed(threads: int) -> float:
    """Bytes that a number of threads read from memory per second: what bounds the speed of decoding."""
    return shared_context(None, threads).read_bandwidth(_READ_BYTES, _READ_SECONDS)
