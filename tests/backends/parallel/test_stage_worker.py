"""What a process of a pipeline does with the messages of the first one."""

from __future__ import annotations

from contextlib import nullcontext
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from deepseek_optimizer.backends.parallel.messages import DONE, END_BYTES, FAILED, pickled, receive
from deepseek_optimizer.backends.parallel.stage_worker import serve_stage
from deepseek_optimizer.errors import CheckpointChangedError, RankLostError


class Steps:
    """A plan whose decode steps have ended in these ways, call by call."""

    def __init__(self, *ends):
        self.ends, self.links = list(ends), []

    def follow(self, batch, store, link):
        self.links.append(link)
        if (end := self.ends.pop(0)) is not None:
            raise end


@pytest.fixture
def links():
    first, other = Pipe()
    yield first, other
    first.close()
    other.close()


def serve(other, plan):
    backend = SimpleNamespace(thread_context=nullcontext, plans=[plan], new_store=lambda *_: SimpleNamespace(saved_bytes=96))
    return serve_stage(backend, SimpleNamespace(graph=None, fingerprint=str), other)


def send(first, *messages):
    for message in messages:
        first.send_bytes(pickled(message))


NEW_STORE, DECODE = ("new_store", 1, "fp32", 4), ("decode", 0, 1, None)


def test_decode_steps_are_not_answered(links):
    first, other = links
    plan = Steps(None, None)
    send(first, NEW_STORE, DECODE, DECODE, ("fingerprint", True))
    first.send_bytes(END_BYTES)
    assert serve(other, plan)
    assert plan.links == [other.fileno()] * 2
    assert [receive(first) for _ in range(2)] == [(DONE, 96), (DONE, "True")]


def test_what_comes_instead_of_rows_is_the_next_message(links):
    first, other = links
    send(first, NEW_STORE, DECODE, ("fingerprint", False))
    first.send_bytes(END_BYTES)
    assert serve(other, Steps(RankLostError("the first process")))
    assert [receive(first) for _ in range(2)] == [(DONE, 96), (DONE, "False")]


def test_it_ends_if_the_first_process_is_gone(links):
    first, other = links

    def follow(*_):
        first.close()
        raise RankLostError("the first process")

    send(first, NEW_STORE, DECODE)
    assert not serve(other, SimpleNamespace(follow=follow))


@pytest.mark.parametrize(("error", "raised"), [(ValueError("no room"), True), (CheckpointChangedError("it", file="f"), False)])
def test_steps_that_fail_are_answered(links, error, raised):
    """A changed file is a user's doing, which needs no traceback."""
    first, other = links
    send(first, NEW_STORE, DECODE)
    with pytest.raises(type(error)) if raised else nullcontext():
        assert not serve(other, Steps(error))
    assert receive(first) == (DONE, 96)
    assert receive(first) == (FAILED, f"{type(error).__name__}: {error}")
