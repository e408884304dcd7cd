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
from deepseek_optimizer.backends.cpu.group import Group
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
        group = Group(memory, 0, 2)
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
