"""Clients that disconnect from a real engine: at every stage, their slot and blocks are free one step later, and no other
request is affected.

The test releases the engine's steps one by one, so it knows the stage of a request when its client disconnects.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.bench.http_client import reply_of, request_bytes
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support.live_server import LiveServer, wait_for

PATH = "/v1/completions"
COMPANION = {"prompt": "somebody else", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
LEAVER = {"prompt": "x" * 100, "max_tokens": 100, "temperature": 0, "ignore_eos": True, "stream": True}
PIECE = 16  # tokens per step: the prompt of the disconnecting client takes several


class Stepped:
    """Controls an engine's steps."""

    def __init__(self, engine) -> None:
        self._core, self._step = engine.core, engine.core.step
        self._changed = threading.Condition()
        self._allowed: float = float("inf")
        self.taken = 0
        engine.core.step = self._gated

    def _gated(self):
        with self._changed:
            self._changed.wait_for(lambda: self._allowed > 0)
            self._allowed -= 1
        try:
            return self._step()
        finally:
            self.taken += 1

    def hold(self) -> None:
        """Lets no further step start."""
        with self._changed:
            self._allowed = 0

    def allow(self, steps: float) -> None:
        """Allows this many steps, and waits until they have finished."""
        until = self.taken + steps
        with self._changed:
            self._allowed += steps
            self._changed.notify()
        if steps != float("inf"):
            wait_for(lambda: self.taken >= until)


class Held(LiveServer):
    """A server whose engine runs at most two requests, step by step."""

    def __init__(self, model, settings=None, **options) -> None:
        loaded = load_model(model, precision="fp32", kv_cache_memory=1 << 24, threads=1)
        engine = make_async_engine(
            loaded, AutoTokenizer.from_pretrained(model), model_name="tiny", step_tokens=PIECE, prefix_cache=False, **options
        )
        self.steps, self.cancelled = Stepped(engine), []
        cancel = engine.cancel
        engine.cancel = lambda request_id: (self.cancelled.append(request_id), cancel(request_id))
        super().__init__(engine, settings)

    def __exit__(self, *_) -> None:
        self.steps.allow(float("inf"))
        super().__exit__()

    def request(self, prompt: str):
        """The engine's request with this prompt, or None."""
        decode = self.engine.tokenizer.decode
        result = [r for r in list(self.engine.core._requests.values()) if decode(r.request.prompt) == prompt]
        return result[0] if result else None

    def let_in(self, prompt: str):
        """Waits for `request`: the engine admits it between two steps, or while it is idle."""
        decode, answers = self.engine.tokenizer.decode, self.engine._answers
        wait_for(lambda: any(decode(answer.request.prompt) == prompt for answer in list(answers.values())))
        self.steps.allow(1)
        wait_for(lambda: self.request(prompt))
        return self.request(prompt)


@pytest.fixture(scope="module")
def server(tiny_model) -> Iterator[Held]:
    with Held(tiny_model, batch_size_range=(2, 2)) as live:  # otherwise one on a busy machine
        yield live


@pytest.fixture(scope="module")
def alone(server) -> str:
    """The other client's text when it is alone."""
    return whole(server.raw(request_bytes(PATH, COMPANION)))


def whole(answer: bytes) -> str:
    """The text of a complete stream."""
    reply = reply_of([(0.0, answer)])
    assert reply.done
    return reply.text


class Client:
    """A connection with one request."""

    def __init__(self, live: LiveServer, body: dict) -> None:
        self.sock = live.connect(30)
        self.sock.sendall(request_bytes(PATH, body))

    def read(self) -> bytes:
        pieces = []
        while piece := self.sock.recv(65536):
            pieces.append(piece)
        self.sock.close()
        return b"".join(pieces)

    def leave(self) -> None:
        """Closes the connection with a reset, like a killed process."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.sock.close()


def blocks_in_use(live: LiveServer) -> int:
    manager = live.engine.core.memory.manager
    return manager.num_blocks - manager.free_blocks


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["queued", "prefill", "streaming"])
def test_disconnected_clients_are_removed_a_step_later(server, alone, stage, stream):
    server.steps.hold()
    companion = Client(server, COMPANION)
    server.let_in(COMPANION["prompt"])
    others = []
    if stage == "queued":  # two are running; the disconnecting client is the third
        others = [Client(server, {**COMPANION, "prompt": "a second"})]
        server.let_in("a second")
        server.steps.allow(4)
    leaver = Client(server, {**LEAVER, "stream": stream})
    running = server.let_in(LEAVER["prompt"])
    server.steps.allow(2 if stage != "streaming" else 20)
    where = "queued" if running in server.engine.core.scheduler.waiting else "streaming" if running.generated else "prefill"
    assert where == stage and (stage != "prefill" or 0 < running.sequence.cached < 100)
    before = len(server.cancelled)
    leaver.leave()
    wait_for(lambda: len(server.cancelled) > before)  # the engine got the cancellation
    server.steps.allow(2)  # one may have started already
    assert server.request(LEAVER["prompt"]) is None and running not in server.engine.core.scheduler.running
    assert not running.sequence.blocks.blocks
    wait_for(lambda: server.engine.admitted == 1 + len(others))
    server.steps.allow(float("inf"))
    assert whole(companion.read()) == alone
    for other in others:
        whole(other.read())
    wait_for(lambda: server.engine.admitted == 0)
    assert blocks_in_use(server) == 0


def test_clients_that_disconnect_at_the_end_leave_nothing(server, alone):
    client = Client(server, {**LEAVER, "max_tokens": 2})
    data = b""
    while b"[DONE]" not in data:
        data += client.sock.recv(65536)
    client.leave()
    wait_for(lambda: server.engine.admitted == 0)
    assert blocks_in_use(server) == 0
    assert whole(server.raw(request_bytes(PATH, COMPANION))) == alone


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_deadline_ends_a_request_at_the_next_step(tiny_model, stream, begun):
    with Held(tiny_model, ServerSettings(request_seconds=1.0)) as live:
        live.steps.hold()
        client = Client(live, {**LEAVER, "stream": stream})
        wait_for(lambda: live.request(LEAVER["prompt"]))
        if begun:
            live.steps.allow(12)
            assert live.request(LEAVER["prompt"]).generated
        time.sleep(1.1)
        live.steps.allow(1)
        assert live.request(LEAVER["prompt"]) is None and blocks_in_use(live) == 0
        reply = reply_of([(0.0, client.read())])
        assert reply.status == (200 if stream and begun else 504) and reply.whole
        assert b"the request timed out" in reply.body
        live.steps.allow(float("inf"))
        wait_for(lambda: live.engine.admitted == 0)
        assert live.client.post(PATH, json={"prompt": "x", "max_tokens": 2}).status_code == 200
