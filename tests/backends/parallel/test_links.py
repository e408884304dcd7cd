"""The connections of a pipeline's first process to others that answer what a test wants: errors, ends and interrupts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

import pytest

from deepseek_optimizer.backends.parallel import links as links_module
from deepseek_optimizer.backends.parallel.links import Links
from deepseek_optimizer.errors import BackendError, RankLostError

_PROCESS = """
import pickle, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
def answer(*value):
    pipe.send_bytes(pickle.dumps(value))
def wait():
    return pickle.loads(pipe.recv_bytes())
{body}
"""


@pytest.fixture
def link():
    """Starts a process with this body as rank 1; returns the links to it."""
    made = []

    def start(body):
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", _PROCESS.format(body=body), str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stderr=subprocess.DEVNULL)
        theirs.close()
        made.append(Links([Connection(ours.detach())], [process]))
        return made[-1]

    yield start
    for links in made:
        links.close()


def test_messages_are_answered_in_order(link):
    links = link("while (m := wait())[0] != 'end': answer('done', m[1] + 1)")
    assert [links.together(lambda n=n: links.ask(1, "next", n)) for n in range(5)] == [1, 2, 3, 4, 5]
    links.check()


def test_a_process_that_cannot_load(link):
    with pytest.raises(BackendError, match="rank 1 of 2 cannot load its part of the model: CheckpointError: it is truncated"):
        link("answer('failed', 'CheckpointError: it is truncated')").started()


def test_a_process_with_another_model(link):
    with pytest.raises(BackendError, match="rank 1 of 2 has loaded another model"):
        link("answer('ready', 'a'); wait()").started("b")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("sys.exit(3)", "ended with status 3"),
        ("import os; os.kill(os.getpid(), 15)", "was killed by SIGTERM"),
        ("wait(); answer('failed', 'MemoryError: none is left')", "MemoryError: none is left"),
    ],
)
def test_a_process_that_ends(link, body, text):
    links = link(body)
    for _ in range(2):
        with pytest.raises(RankLostError, match=rf"rank 1 of 2.*{text}"):
            links.together(lambda: links.ask(1, "step"))


def test_a_process_of_another_machine_that_ends_is_noticed_without_a_message():
    ours, theirs = socket.socketpair()
    links = Links([Connection(ours.detach())])
    links.check()
    theirs.close()
    with pytest.raises(RankLostError, match="rank 1 of 2: the connection to it has ended"):
        links.check()


def test_an_interrupt_waits_for_the_answer(link):
    """Afterwards, answers still belong to their messages."""
    links = link("while (m := wait())[0] != 'end': time.sleep(0.8); answer('done', m[1])")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        links.together(lambda: links.ask(1, "step", 1))
    assert links.together(lambda: links.ask(1, "step", 2)) == 2


def test_closed_links_end_the_process(link):
    links = link("while wait()[0] != 'end': pass")
    links.close()
    for pid in links.pids:
        for _ in range(100):
            if not os.path.exists(f"/proc/{pid}"):
                break
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(RankLostError, match="the leader, has ended the others"):
        links.together(lambda: links.ask(1, "step"))


def test_links_that_another_thread_waits_at_are_closed(link, monkeypatch):
    """No message comes between the parts of one that it may be sending; the process is killed."""
    monkeypatch.setattr(links_module, "_PATIENCE", 0.2)
    links, asked, errors = link("wait(); time.sleep(600)"), threading.Event(), []

    def step():
        asked.set()
        links.ask(1, "step")

    def wait():
        try:
            links.together(step)
        except RankLostError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert asked.wait(10)
    links.close()
    thread.join(20)
    assert not thread.is_alive() and "the leader, has ended the others" in errors[0]
    assert not os.path.exists(f"/proc/{links.pids[0]}")
