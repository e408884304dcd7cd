"""An error does not repeat a client's input in full: long texts are truncated."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from deepseek_optimizer.server.settings import ServerSettings

LONG = "q" * 10_000
MAX = 1_000  # maximum bytes of an error, for any request
FUNCTION = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"type": "string", "format": "date", "pattern": "a"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"a": {"enum": ["x"]}},
}
CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    "max_tokens": 1,
    "temperature": 0,
    "stop": ["x"],
    "logit_bias": {"5": 1},
    "reasoning_effort": "low",
    "chat_template_kwargs": {"thinking": True},
}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        CHAT,
        {**CHAT, "tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                }
            ]
        },
    ],
    "/v1/completions": [
        {"model": "m", "prompt": "hello", "max_tokens": 1, "top_p": 1.0},
    ],
    "/v1/responses": [
        {
            "model": "m",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
            "previous_response_id": "r",
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        }
    ],
    "/v1/embeddings": [{"model": "m", "input": "hello", "encoding_format": "float"}],
    "/tokenize": [{"model": "m", "prompt": "hello", "messages": []}],
    "/detokenize": [{"model": "m", "tokens": [1]}],
}


def with_long_text(value: Any) -> Iterator[Any]:
    """Yields copies of a value with a long text in one place: as each value, as each key, and as an extra key."""
    yield LONG
    if isinstance(value, dict):
        yield {**value, LONG: 1}
        for key, inner in value.items():
            yield {**{k: v for k, v in value.items() if k != key}, LONG: inner}
            for other in with_long_text(inner):
                yield {**value, key: other}
    elif isinstance(value, list):
        yield [*value, LONG]
        for i, inner in enumerate(value):
            for other in with_long_text(inner):
                yield [*value[:i], other, *value[i + 1 :]]


@pytest.fixture(scope="module")
def answers(byte_tokenizer):
    from support.chats import HERMES
    from support.fake_engine import FakeEngine
    from support.live_server import LiveServer

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES
    with LiveServer(FakeEngine(tokenizer, context=512), ServerSettings(grammar_seconds=1.0)) as live:
        yield live.client


@pytest.mark.parametrize("path", BODIES)
def test_errors_quote_only_the_beginning(answers, path):
    tried = 0
    for body in BODIES[path]:
        for broken in with_long_text(body):
            if not isinstance(broken, dict):
                continue
            actual = answers.post(path, json=broken)
            assert actual.status_code in (200, 400, 404, 429), actual.text
            if actual.status_code != 200:
                assert len(actual.content) < MAX, actual.text[:300]
                tried += 1
    assert tried > 3


def test_addresses_headers_and_forms(answers):
    for actual in (
        answers.get(f"/v1/models/{LONG}"),
        answers.get(f"/v1/files/{LONG}"),
        answers.get(f"/v1/files?purpose={LONG}"),
        answers.get(f"/v1/files?limit={LONG}"),
        answers.get(f"/v1/files?{LONG}=1"),
        answers.get(f"/{LONG}"),
        answers.post("/v1/completions", content=b"{}", headers={"content-type": LONG}),
        answers.post("/v1/completions", content=b'{"' + LONG.encode(), headers={"content-type": "application/json"}),
        answers.get("/health", headers={"host": LONG}),
        answers.post("/v1/files", files={"file": (LONG, b"x")}, data={"purpose": "user_data"}),
        answers.post("/v1/files", files={"file": ("a" * 200 + ".docx", b"x")}, data={"purpose": "user_data"}),
        answers.post("/v1/files", files={"file": ("a.txt", b"x")}, data={"purpose": LONG}),
        answers.post("/v1/files", files={"file": ("a.txt", b"x")}, data={LONG: "x"}),
        answers.post("/v1/files", files={LONG: ("a.txt", b"x")}, data={"purpose": "user_data"}),
    ):
        assert actual.status_code == 200 or len(actual.content) < MAX, (actual.request.url.path[:30], actual.text[:300])
