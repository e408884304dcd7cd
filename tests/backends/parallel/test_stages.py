"""The first process's store of a pipeline; tests/integration/load/test_stages.py compares whole models."""

from __future__ import annotations

import pickle
import socket
import threading
from multiprocessing.connection import Connection
from types import SimpleNamespace

import numpy as np
import torch

from deepseek_optimizer.backends.base import StepBatch
from deepseek_optimizer.backends.parallel.links import Links
from deepseek_optimizer.backends.parallel.stage_worker import next_message
from deepseek_optimizer.backends.parallel.stages import FirstStore


def test_a_store_that_is_freed_while_a_message_is_sent():
    """Python may finalize it in any thread, also between the parts of a long message."""
    ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
    links, freed, got = Links([ours]), threading.Event(), []

    def serve():
        while not got or got[-1][0] != "end":
            got.append(pickle.loads(theirs.recv_bytes()))
            if got[-1][0] in ("new_store", "step"):
                theirs.send_bytes(pickle.dumps(("done", 64)))
            if got[-1][0] == "new_store":
                freed.wait(1)  # meanwhile, a part of the long message is sent

    other = threading.Thread(target=serve, daemon=True)
    other.start()
    store = FirstStore(SimpleNamespace(num_blocks=4, saved_bytes=64), "fp32", [], 128, links)
    number, sending = store.number, threading.Event()

    def send():
        def step():
            sending.set()
            return links.ask(1, "step", bytes(8 << 20))

        links.together(step)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert sending.wait(10)
    del store
    freed.set()
    sender.join(20)
    links.together(lambda: links.ask(1, "step", b"next"))
    links.close()
    other.join(20)
    assert not other.is_alive() and not sender.is_alive()
    assert [message[0] for message in got] == ["new_store", "step", "drop_store", "step", "end"]
    assert got[1][1] == bytes(8 << 20) and got[2][1] == number


def test_a_step_comes_with_its_rows_is_left_out_or_ends_with_the_group():
    ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
    links, rows = Links([ours]), torch.randn(2, 8, dtype=torch.float32)
    for number, sent in ((1, rows), (2, None), (3, -rows)):
        links.send(1, "run", 0, number, StepBatch(*[np.zeros(2, np.int32)] * 7))
        links.send_rows(1, sent)
    for number, sent in ((1, rows), (3, -rows)):
        name, (plan, got, batch) = next_message(theirs)
        assert (name, plan, got) == ("run", 0, number) and torch.equal(batch.states, sent)
    links.send(1, "run", 0, 4, StepBatch(*[np.zeros(2, np.int32)] * 7))
    links.close()
    assert next_message(theirs) == ("end", [])
