"""A model over two machines: here two processes over the loopback device, and in two network namespaces with a delay."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import torch

from deepseek_optimizer import ConfigError
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.integration.load import proven_links
from deepseek_optimizer.integration.load.rendezvous import Place
from support.divided import close, load_divided, save_divisible
from support.family_configs import qwen2, qwen2_moe
from support.namespaces import ADDRESSES, two_namespaces

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")

KEY = "a secret of these tests"
WAYS = [{"pipeline": 2}, {"tensor": 2}, {"expert": 2}]
_PROCESS = """
import ast, hashlib, sys
import torch
from deepseek_optimizer import RankLostError, load_model
model = load_model(sys.argv[1], precision="fp32", threads=1, parallel=ast.literal_eval(sys.argv[2]))
ids = torch.tensor([[5, 3, 9, 7]])
tokens = model.generate(ids, max_new_tokens=8, do_sample=False).tolist()[0]
logits = model(torch.arange(70)[None] * 3).logits
print(tokens, hashlib.sha256(logits.numpy().tobytes()).hexdigest(), flush=True)
if sys.stdin.readline().strip() == "again":
    try:
        model.generate(ids, max_new_tokens=200, do_sample=False)
    except RankLostError as error:
        print("lost:", error, flush=True)
"""


@pytest.fixture(scope="module", params=WAYS, ids=["pipeline", "tensor", "expert"])
def ways(request):
    return request.param


@pytest.fixture(scope="module")
def saved(ways, tmp_path_factory):
    family, fields = (
        (qwen2_moe, {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 160}) if "expert" in ways else (qwen2, {})
    )
    return save_divisible(tmp_path_factory.mktemp("hosts") / "model", family, **fields)


@pytest.fixture(scope="module")
def expected(ways, saved):
    """What processes on one machine answer, which share memory."""
    model = load_divided(saved, precision="fp32", parallel=ways)
    tokens = model.generate(torch.tensor([[5, 3, 9, 7]]), max_new_tokens=8, do_sample=False).tolist()[0]
    logits = model(torch.arange(70)[None] * 3).logits
    close(model)
    return f"{tokens} {hashlib.sha256(logits.numpy().tobytes()).hexdigest()}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(folder, ways, rank, address, port, prefix=()):
    """The process of a rank, as by hand on its machine."""
    variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": address, "MASTER_PORT": port, "DSO_RANK_KEY": KEY}
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in variables.items()}}
    command = [*prefix, sys.executable, "-c", _PROCESS, str(folder), str(ways)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def check_two(folder, ways, expected, address, killed=None, prefixes=((), ())):
    """Both start; the first one answers. Then one is killed, and the other one says so or fails, or both end well."""
    port = free_port()
    first, second = (start(folder, ways, rank, address, port, prefixes[rank]) for rank in range(2))
    try:
        line = first.stdout.readline().strip()
        assert line == expected, first.communicate(timeout=60)[1][-3000:]
        if killed == 1:
            second.send_signal(signal.SIGKILL)
            second.wait()
            out, err = first.communicate("again\n", timeout=300)
            assert "lost:" in out and "rank 1 of 2: the connection to it has ended" in out, err[-3000:]
        elif killed == 0:
            first.send_signal(signal.SIGKILL)
            assert second.wait(timeout=300) == 1
        else:
            _, err = first.communicate("\n", timeout=300)
            assert second.wait(timeout=300) == 0 and first.returncode == 0, err[-3000:]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


@pytest.mark.wide
@pytest.mark.parametrize("killed", [0, 1])
def test_over_the_loopback_device(saved, ways, expected, killed):
    check_two(saved, ways, expected, "127.0.0.1", killed)


@pytest.fixture
def namespaces():
    with two_namespaces() as prefixes:
        yield prefixes


@pytest.mark.wide
def test_over_two_network_namespaces(saved, ways, expected, namespaces):
    check_two(saved, ways, expected, ADDRESSES[0], prefixes=namespaces)


@pytest.mark.slow
@pytest.mark.parametrize("ways", [{"tensor": 2}], ids=["tensor"], indirect=True)
def test_a_machine_that_vanishes(saved, ways, namespaces):
    """Its packets are lost from now on: neither side is told that the other one has ended."""
    port = free_port()
    first, second = (start(saved, ways, rank, ADDRESSES[0], port, namespaces[rank]) for rank in range(2))
    try:
        assert first.stdout.readline()
        name, begin = namespaces[1][-1], time.monotonic()
        subprocess.run(["ip", "-n", name, "link", "set", "dso0", "down"], check=True)
        out, err = first.communicate("again\n", timeout=200)
        assert "rank 1 of 2: the connection to it has ended" in out, err[-3000:]
        assert second.wait(timeout=200) == 1
        assert 15 < time.monotonic() - begin < 120
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_both_sides_prove_that_they_know_the_key():
    first = Place(0, 2, "127.0.0.1", free_port(), KEY.encode(), hosted=False)
    second, links = replace(first, rank=1), []
    stranger = replace(second, key=b"another secret, of others")
    accepting = threading.Thread(target=lambda: links.extend(first.accept()))
    accepting.start()
    with pytest.raises(BackendError, match="rank 1 cannot reach rank 0 at 127.0.0.1, or it has another DSO_RANK_KEY"):
        stranger.connect()
    link = second.connect()
    accepting.join(timeout=60)
    links[0].send_bytes(b"welcome")
    assert link.recv_bytes() == b"welcome"


def test_processes_that_torchrun_has_restarted_meet_anew():
    """torchrun's store still has the port of a process that has ended."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first = Place(0, 2, "127.0.0.1", store.port, KEY.encode(), hosted=True)
    second = replace(first, rank=1)
    for attempt in range(3):
        with ThreadPoolExecutor(1) as pool:
            accepting = pool.submit(first.accept)
            link = second.connect()
            (accepted,) = accepting.result(timeout=60)
        accepted.send(attempt)
        assert link.recv() == attempt
        link.close()


def test_connections_that_say_nothing_delay_nobody(monkeypatch):
    """Rank 0 waits 10 s for each of them, but for all at once; what is no challenge is refused."""
    servers, create = [], socket.create_server

    def remembered(*arguments, **options):
        servers.append(create(*arguments, **options))
        return servers[-1]

    first = Place(0, 2, "127.0.0.1", free_port(), KEY.encode(), hosted=False)
    monkeypatch.setattr(proven_links.socket, "create_server", remembered)
    links, accepting = [], threading.Thread(target=lambda: links.extend(first.accept()))
    accepting.start()
    while not servers:
        time.sleep(0.01)
    address = servers[0].getsockname()
    silent = [socket.create_connection(address) for _ in range(2)]
    wrong = Connection(socket.create_connection(address).detach())
    wrong.send_bytes(b"no digest")
    link = replace(first, rank=1).connect()
    accepting.join(timeout=8)
    assert not accepting.is_alive()
    links[0].send_bytes(b"welcome")
    assert link.recv_bytes() == b"welcome"
    for connected in silent:
        connected.close()


def test_a_rank_that_connects_again_replaces_its_first_connection():
    first = Place(0, 3, "127.0.0.1", free_port(), KEY.encode(), hosted=False)
    second, links = replace(first, rank=1), []
    accepting = threading.Thread(target=lambda: links.extend(first.accept()))
    accepting.start()
    early = second.connect()
    time.sleep(0.5)  # until rank 0 has noticed it
    late = second.connect()
    with pytest.raises((EOFError, ConnectionResetError)):
        early.recv_bytes()
    replace(first, rank=2).connect()
    accepting.join(timeout=60)
    links[0].send_bytes(b"welcome")
    assert late.recv_bytes() == b"welcome"


def test_a_rank_that_does_not_come(monkeypatch):
    monkeypatch.setattr(proven_links, "PATIENCE", 1.0)
    with pytest.raises(BackendError, match="rank 1, 2 has not connected within 1 seconds"):
        Place(0, 3, "127.0.0.1", free_port(), KEY.encode(), hosted=False).accept()


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "5"}, "DSO_RANK_KEY must be the same secret"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "5"}, "must be set, as torchrun sets them"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "must be set, as torchrun sets them"),
    ],
)
def test_invalid_environments(variables, text, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DSO_RANK_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert Place.of_environment() is None
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=text):
        Place.of_environment()
