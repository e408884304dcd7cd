"""A conversation with a server."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

from deepseek_optimizer.chat.conversation import Conversation, StopSignal
from deepseek_optimizer.chat.remote import RemoteError, RemoteSpeaker, _events
from deepseek_optimizer.errors import ConfigError
from support.fake_chat_server import DROP, FakeChatServer, Reply, Thought, error_body


@pytest.fixture
def server():
    with FakeChatServer() as made:
        yield made


def ask(speaker, text="Hi", write=lambda _: None, stop=None):
    return speaker.answer([{"role": "user", "content": text}], write, stop or StopSignal())


def test_an_answer_streams(server):
    server.replies = [Reply(["Bon", "jour \u2028\x85", "👩"])]
    pieces = []
    reply = ask(RemoteSpeaker(server.url, temperature=0.5, max_tokens=9), write=pieces.append)
    assert pieces == ["Bon", "jour \u2028\x85", "👩"] and reply.text == "".join(pieces)
    assert (reply.finish_reason, reply.prompt_tokens, reply.new_tokens) == ("stop", 10, 3)
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"], body["stream"]) == ("tiny", 0.5, 9, True)
    assert body["messages"] == [{"role": "user", "content": "Hi"}]


def test_history_and_reasoning(server):
    """Reasoning is shown, and not sent back."""
    server.replies = [Reply([Thought("hm"), Thought("mm"), "A"], usage={"prompt_tokens_details": {"cached_tokens": 4}})]
    talk, pieces = Conversation(RemoteSpeaker(server.url), system="Be brief."), []
    reply = talk.say("One", pieces.append)
    assert "".join(pieces) == "<think>\nhmmm\n</think>\n\nA" and reply.cached_tokens == 4
    talk.say("Two", pieces.append)
    assert [(m["role"], m["content"]) for m in server.bodies[1]["messages"]] == [
        ("system", "Be brief."), ("user", "One"), ("assistant", "A"), ("user", "Two"),
    ]  # fmt: skip


def test_the_path_of_the_api(server):
    for url in (server.url, server.url + "/", server.url + "/v1", server.url + "/v1/"):
        assert RemoteSpeaker(url).model == "tiny"
    with pytest.raises(RemoteError, match="does not know this model or path.*--url"):
        RemoteSpeaker(server.url + "/other")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host/v1?x=1"])
def test_invalid_urls(url):
    with pytest.raises(ConfigError, match="--url must be a URL such as"):
        RemoteSpeaker(url)


def test_several_models_or_none(server):
    server.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(ConfigError, match="several models.*--model: a, b"):
        RemoteSpeaker(server.url)
    assert ask(RemoteSpeaker(server.url, model="b")).text == "You said: Hi" and server.bodies[-1]["model"] == "b"
    server.models = []
    with pytest.raises(ConfigError, match="name one with --model"):
        RemoteSpeaker(server.url)


def test_keys(server):
    server.api_key = "secret"
    for wrong in (None, "other"):
        with pytest.raises(RemoteError, match="rejects the API key: wrong or missing API key; .*OPENAI_API_KEY"):
            RemoteSpeaker(server.url, wrong)
    assert ask(RemoteSpeaker(server.url, "secret")).text == "You said: Hi"
    for bad in ("schlüssel", "a\nb", " "):
        with pytest.raises(ConfigError, match="printable ASCII"):
            RemoteSpeaker(server.url, bad)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=400, error=error_body("too \x1b[31m long")), r"rejects the request \(400\): too \[31m long$"),
        (Reply(status=404, error=error_body("no model 'x'")), "know this model or path: no model 'x'; check --model"),
        (Reply(status=429, error=error_body("full"), headers={"Retry-After": "7"}), "busy: full; try again in 7 s"),
        (Reply(status=429, error="{}", headers={"Retry-After": "soon"}), "busy; try again later"),
        (Reply(status=503, error={"detail": "draining"}), "busy: draining; try again later"),
        (Reply(status=500, error="<html>oops"), r"failed \(500\)$"),
        (Reply(status=307, headers={"Location": "http://elsewhere/"}), "redirects to another address"),
        (Reply(["a"], error=error_body("out of memory")), "stopped the answer: out of memory"),
        (Reply(["a", DROP]), "closed the connection before the end"),
    ],
)
def test_errors_are_reported_and_do_not_change_the_history(server, reply, message):
    server.replies = [reply]
    talk = Conversation(RemoteSpeaker(server.url))
    with pytest.raises(RemoteError, match=message):
        talk.say("One", lambda _: None)
    assert talk.turns == []
    assert talk.say("Two", lambda _: None).text == "You said: Two"


def test_connection_refused():
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RemoteError, match="cannot be reached .*is a server running there"):
            RemoteSpeaker(url)


def test_invalid_responses(server):
    server.replies = [
        Reply([{"choices": "none"}, {"choices": [{"delta": None}]}, {"choices": [{"delta": {"content": 5}}]}, "A"])
    ]
    speaker = RemoteSpeaker(server.url)
    assert ask(speaker).text == "A"
    with pytest.raises(RemoteError, match="too large for a chat answer"):
        list(_events([b"data: " + b"x" * (1 << 24), b"x"]))


def test_events_in_any_chunks():
    stream = b': comment\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b": "\xe2\x80\xa8"}\n\ndata: [DONE]\n\ndata: {}\n\n'
    for size in range(1, len(stream)):
        cut = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert list(_events(cut)) == [b'{"a": 1}', b'{"b": "\xe2\x80\xa8"}']


def test_stopping_closes_the_stream(server):
    never, stop = threading.Event(), StopSignal()
    server.replies = [Reply(["A", never, "B"])]
    reply = ask(RemoteSpeaker(server.url), write=lambda _: stop.ask(), stop=stop)
    assert (reply.text, reply.finish_reason, reply.new_tokens) == ("A", "interrupted", None)
    assert server.cut.wait(10)


def test_a_signal_while_the_server_is_silent(server):
    """Like Ctrl-C, which arrives while waiting for bytes."""
    never, stop = threading.Event(), StopSignal()
    server.replies = [Reply([never])]
    previous = signal.signal(signal.SIGUSR1, lambda *_: stop.ask())
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        reply = ask(RemoteSpeaker(server.url), stop=stop)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert (reply.text, reply.finish_reason) == ("", "interrupted")
    assert server.cut.wait(10)
