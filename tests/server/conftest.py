"""A server over an engine without a model. Tests must leave the shared server idle."""

from __future__ import annotations

import httpx
import pytest

from deepseek_optimizer.engine.grammar.compiler import GrammarCompiler
from deepseek_optimizer.server.settings import ServerSettings
from support.fake_engine import FakeEngine
from support.live_server import LiveServer, assert_error, wait_for


@pytest.fixture(scope="session")
def grammars(byte_tokenizer):
    """A compiler of grammars for servers of the byte tokenizer, with any template."""
    compiler = GrammarCompiler(byte_tokenizer, len(byte_tokenizer), seconds=ServerSettings().grammar_seconds)
    yield compiler
    compiler.close()


@pytest.fixture(scope="session")
def shared_server(byte_tokenizer, grammars):
    with LiveServer(FakeEngine(byte_tokenizer), ServerSettings(max_body_bytes=1 << 20), grammars=grammars) as live:
        yield live


def _choices(live: LiveServer) -> list:
    return live.client.post("/v1/completions", json={"prompt": "baseline", "max_tokens": 40}).json()["choices"]


@pytest.fixture(scope="module")  # some modules have a shared server of their own
def first_choices(shared_server):
    """What the shared server answered before the module's tests."""
    return _choices(shared_server)


@pytest.fixture
def live(shared_server, first_choices):
    """The shared server. After each test it must be alive, idle, and answer as before."""
    yield shared_server
    wait_for(lambda: shared_server.engine.admitted == 0 and shared_server.engine.running == 0)
    assert shared_server.client.get("/health").status_code == 200
    assert _choices(shared_server) == first_choices


@pytest.fixture
def client(live) -> httpx.Client:
    return live.client


@pytest.fixture(scope="module")
def tiny_server(tiny_model):
    """A server over the tiny model, in fp32."""
    from transformers import AutoTokenizer

    from deepseek_optimizer import load_model
    from deepseek_optimizer.serving import make_async_engine

    loaded = load_model(tiny_model, precision="fp32", kv_cache_memory=1 << 24)
    with LiveServer(make_async_engine(loaded, AutoTokenizer.from_pretrained(tiny_model), model_name="tiny")) as live:
        yield live
        wait_for(lambda: live.engine.admitted == 0)


@pytest.fixture
def make_server(byte_tokenizer):
    """make_server(settings, **engine) -> a server for one test. Avoid chats, which start a process for the template."""
    running = []

    def start(settings: ServerSettings | None = None, tokenizer=byte_tokenizer, **engine) -> LiveServer:
        live = LiveServer(FakeEngine(tokenizer, **engine), settings)
        live.__enter__()
        running.append(live)
        return live

    yield start
    for live in running:
        live.__exit__()


@pytest.fixture
def refused(client):
    """refused(path, body, status=400, param=None): checks for this error in OpenAI's format, without paths or tracebacks."""

    def check(path, body, status=400, param=None, **request):
        sent = {"content": body} if isinstance(body, (bytes, str)) else {"json": body}
        headers = {"content-type": "application/json", **request.pop("headers", {})}
        result = client.post(path, headers=headers, **sent, **request)
        assert_error(result, status, param)
        return result

    return check
