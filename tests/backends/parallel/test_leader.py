"""The leader of processes that answer what a test wants: errors, ends, interrupts and forks."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

import pytest
import torch

from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.backends.cpu.group import ConnectedGroup, SharedGroup
from deepseek_optimizer.backends.parallel import Leader
from deepseek_optimizer.errors import BackendError, RankLostError

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")

_PROCESS = """
import pickle, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
def answer(*value):
    pipe.send_bytes(pickle.dumps(value))
{body}
"""


@pytest.fixture
def lead():
    """Starts a process with this body as rank 1; returns its leader."""
    leaders = []

    def start(body):
        memory = os.memfd_create("test")
        group = SharedGroup(memory, 0, 2)
        os.close(memory)
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", _PROCESS.format(body=body), str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stderr=subprocess.DEVNULL)
        theirs.close()
        leaders.append(Leader(group, [process], [Connection(ours.detach())]))
        return leaders[-1]

    yield start
    for leader in leaders:
        leader.group.lose(1)  # none of these processes reads messages
        leader.close()


_CONNECTED = """
import pickle, sys, time
from multiprocessing.connection import Connection
rows, link = (Connection(int(number)) for number in sys.argv[1:])
def wait():
    return pickle.loads(link.recv_bytes())
def say(*value):
    link.send_bytes(pickle.dumps(value))
{body}
"""


@pytest.fixture
def lead_connected():
    """Starts processes with these bodies as on other machines; returns their leader, and the processes."""
    started, leaders = [], []

    def start(*bodies):
        ours = ({}, {})
        for rank, body in enumerate(bodies, 1):
            pairs = [socket.socketpair() for _ in ours]
            numbers = tuple(theirs.fileno() for _, theirs in pairs)
            command = [sys.executable, "-c", _CONNECTED.format(body=body), *map(str, numbers)]
            started.append(subprocess.Popen(command, pass_fds=numbers, stderr=subprocess.DEVNULL))
            for links, (own, theirs) in zip(ours, pairs, strict=True):
                links[rank] = Connection(own.detach())
                theirs.close()
        group = ConnectedGroup(0, 1 + len(bodies), *ours, (0, 1))
        leaders.append(Leader(group, (), group.links))
        return leaders[-1], started

    yield start
    for leader in leaders:
        leader.close()
    for process in started:
        process.kill()
        process.wait()


def test_connected_processes_get_messages_and_end(lead_connected):
    leader, processes = lead_connected(*["say('done', wait()[1] + 1); sys.exit(7 if wait() == ('end',) else 1)"] * 2)
    assert leader.ask(("next", 4), lambda: 0) == [0, 5, 5]
    leader.check()
    leader.close()
    assert [process.wait(60) for process in processes] == [7, 7]
    with pytest.raises(RankLostError, match="the leader, has ended the others"):
        leader.together(("step",), _checked(leader))


def test_connected_processes_with_another_model(lead_connected):
    leader, _ = lead_connected("say('ready', 'a'); wait()", "say('ready', 'b'); wait()")
    with pytest.raises(BackendError, match="rank 2 of 3 has loaded another model"):
        leader.started("a")


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ("wait(); say('lost', 2)", "sys.exit(0)", "rank 2 of 3: the connection to it has ended"),  # found by rank 1 first
        ("wait(); say('lost', 2)", "wait(); say('failed', 'MemoryError: none is left')", "rank 2 of 3: MemoryError: none is"),
        ("wait(); say('lost', 2)", "wait(); say('lost', 1)", "rank . of 3: the connection to it has ended"),
        ("os = __import__('os'); os.kill(os.getpid(), 9)", "wait()", "rank 1 of 3: the connection to it has ended"),
    ],
)
def test_a_connected_process_that_ends(lead_connected, first, second, text):
    """Its connections tell so, without a message; the other one ends too, since it gets no more of them."""
    leader, processes = lead_connected(first, second)
    if "wait(); say" in first:
        leader.group.send(b"\x80\x04N.")
    with pytest.raises(RankLostError, match=text):
        for _ in range(1000):
            leader.check()
            time.sleep(0.02)
    for _ in range(2):
        with pytest.raises(RankLostError, match=text):
            leader.together(("step",), _checked(leader))
    for process in processes:
        process.wait(60)


def test_a_process_that_cannot_load(lead):
    leader = lead('answer("failed", "CheckpointError: model.safetensors: is truncated")')
    with pytest.raises(BackendError, match="rank 1 of 2 cannot load its part of the model: CheckpointError.*truncated"):
        leader.started()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("sys.exit(3)", "ended with status 3"),
        ("import os; os.kill(os.getpid(), 15)", "was killed by SIGTERM"),
        ('answer("failed", "MemoryError: none is left"); sys.exit(1)', "MemoryError: none is left"),
    ],
)
def test_a_process_that_ends(lead, body, text):
    leader = lead(body)
    for _ in range(200):
        if leader.group.lost is not None:
            break
        time.sleep(0.05)
    (pid,) = leader.pids
    for _ in range(2):
        with pytest.raises(RankLostError, match=rf"rank 1 of 2, process {pid}.*{text}"):
            leader.together(("step",), _checked(leader))


def _checked(leader):
    """A step, which finds out that a process is lost as native plans do."""

    def step():
        if leader.group.lost is not None:
            raise RankLostError("rank 1")

    return step


def test_an_interrupt_waits_for_the_step(lead):
    """Afterwards, the processes agree on what they have done."""
    leader, done = lead("time.sleep(60)"), []
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))

    def step():
        timer.start()
        time.sleep(1.0)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        leader.together(("step",), step)
    assert done and leader.group.lost is None
    leader.together(("step",), lambda: done.append(True))
    assert len(done) == 2


def test_an_error_within_a_step_ends_the_group(lead):
    leader = lead("time.sleep(60)")
    with pytest.raises(ZeroDivisionError):
        leader.together(("step",), lambda: 1 // 0)
    assert leader.group.lost == 0
    with pytest.raises(RankLostError, match="the leader, could not finish a step"):
        leader.together(("step",), _checked(leader))


def test_of_a_large_tensor_only_the_rows_of_a_step_are_sent(lead, monkeypatch):
    leader, sent = lead("time.sleep(60)"), []
    monkeypatch.setattr(leader.group, "send", sent.append)
    states = torch.arange(64_000, dtype=torch.float32).view(1000, 64)[7:8]
    leader.together(("run", states), lambda: None)
    (message,) = sent
    assert len(message) < 1000 and torch.equal(pickle.loads(message)[1], states)


def test_a_fork_cannot_lead(lead):
    leader = lead("time.sleep(60)")
    child = os.fork()
    if child == 0:
        try:
            leader.together(("step",), lambda: None)
        except BackendError as error:
            os._exit(0 if "cannot be used after a fork" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert leader.group.lost is None


def test_a_fork_does_not_end_the_processes(lead):
    """A fork that ends calls the finalizers of all objects that it has copies of."""
    leader = lead("time.sleep(60)")
    child = os.fork()
    if child == 0:
        leader.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert leader.group.lost is None
    leader.together(("step",), _checked(leader))


def test_a_closed_leader_does_not_wait_for_processes(lead):
    leader = lead("time.sleep(60)")
    leader.close()
    with pytest.raises(RankLostError, match="the leader, has ended the others"):
        leader.together(("step",), _checked(leader))


def test_messages_of_several_threads_are_in_order(lead):
    """Whatever a thread does here belongs to its message: no other message comes between."""
    leader, running, overlaps = lead("time.sleep(60)"), [], []

    def step():
        overlaps.append(len(running))
        running.append(True)
        time.sleep(0.002)
        running.pop()

    threads = [threading.Thread(target=lambda: [leader.together(("step",), step) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [0] * 80
