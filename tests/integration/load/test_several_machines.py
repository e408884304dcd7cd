"""Processes of several machines connect with each other, and agree on how they compute; here they are threads."""

from __future__ import annotations

import itertools
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from deepseek_optimizer import ConfigError, DeepSeekConfig
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.integration.load import several_machines
from deepseek_optimizer.integration.load.mesh import connect_all
from deepseek_optimizer.integration.load.rendezvous import Place
from deepseek_optimizer.integration.load.several_machines import rank_of_machines

KEY = b"a secret of these tests"


def places(ranks):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [Place(rank, ranks, "127.0.0.1", port, KEY, hosted=False) for rank in range(ranks)]


def in_threads(function, ranks):
    with ThreadPoolExecutor(ranks) as pool:
        return [call.result(timeout=60) for call in [pool.submit(function, place) for place in places(ranks)]]


def first_links(place):
    return dict(enumerate(place.accept(), 1)) if place.rank == 0 else {0: place.connect()}


def user_timeout(link):
    with socket.socket(fileno=os.dup(link.fileno())) as connected:
        return connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_two_processes_have_two_connections(ranks):
    meshes = in_threads(lambda place: connect_all(place, first_links(place)), ranks)
    for one, other in itertools.permutations(range(ranks), 2):
        for kind in (0, 1):
            meshes[one][kind][other].send_bytes(f"{one} to {other}, {kind}".encode())
            assert meshes[other][kind][one].recv_bytes() == f"{one} to {other}, {kind}".encode()
        assert user_timeout(meshes[one][0][other]) == 0 and user_timeout(meshes[one][1][other]) == 20_000
    for link in (link for mesh in meshes for kind in mesh for link in kind.values()):
        link.close()


def test_a_process_that_ends_while_others_connect():
    """They do not wait for the ten minutes that it may take to come."""

    def run(place):
        links = first_links(place)
        if place.rank == 2:
            links[0].close()
            return "ended"
        with pytest.raises(BackendError, match=f"rank {place.rank} cannot connect to all others"):
            connect_all(place, links)
        return "told"

    assert in_threads(run, 3) == ["told", "told", "ended"]


@pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")
def test_they_compute_alike(monkeypatch):
    """With as many threads as the machine with the fewest."""
    monkeypatch.setattr(several_machines, "forced_threads", lambda: None)

    def run(place):
        member = rank_of_machines(place, DeepSeekConfig(parallel={"tensor": 2}, threads=3 - place.rank))
        assert member.group.lost is None and not member.one_host
        assert (member.group.rank, member.group.index_here, member.group.ranks_here) == (place.rank, 0, 1)
        return member

    members = in_threads(run, 2)
    assert [member.threads for member in members] == [2, 2]
    members[0].leader.close()
    assert members[1].group.lost == 0


def test_machines_with_different_instructions(monkeypatch):
    monkeypatch.setattr(several_machines, "CpuBackend", lambda isa, threads: SimpleNamespace(isa=isa))

    def run(place):
        settings = SimpleNamespace(isa=("avx512_vnni", "avx2")[place.rank], threads=1, parallel="tensor=2")
        with pytest.raises(ConfigError, match="rank 0 has avx512_vnni, and rank 1 has avx2; set isa, or DSO_ISA"):
            rank_of_machines(place, settings)

    in_threads(run, 2)


@pytest.mark.parametrize(("variables", "here"), [({}, (0, 1)), ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 2))])
def test_processes_of_a_machine(variables, here, monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "5", "DSO_RANK_KEY": KEY.decode(), **variables}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert Place.of_environment().here == here
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="LOCAL_RANK and LOCAL_WORLD_SIZE must be set as torchrun sets them"):
        Place.of_environment()
