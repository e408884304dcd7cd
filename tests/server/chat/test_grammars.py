"""Required forms of an answer: JSON, a schema, a regular expression, a grammar, calls; and forms that no answer can have."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.fake_engine import FakeEngine
from support.live_server import LiveServer, assert_error

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200}
PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "enum": [7]}, "s": {"enum": ["yes"]}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


def schema_format(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


def text_of(live, path=PATH, **fields):
    body = CHAT if path == PATH else {"prompt": "x", "max_tokens": 200}
    result = live.client.post(path, json={**body, **fields})
    assert result.status_code == 200, result.text
    choice = result.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"] if path == PATH else choice["text"]


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_the_text_follows_the_grammar(live, path):
    assert json.loads(text_of(live, path, response_format=schema_format(SCHEMA, strict=True))) == {"n": 7, "s": "yes"}
    assert re.fullmatch("(cat|dog){2}", text_of(live, path, guided_regex="(cat|dog){2}"))
    assert text_of(live, path, guided_grammar='root ::= "a" [b-d] "\\n"')[0] == "a"
    assert text_of(live, path, response_format={"type": "text"}).startswith("Answer")


def test_a_json_object_begins_like_one(live):
    actual = live.client.post(PATH, json={**CHAT, "max_tokens": 3, "response_format": {"type": "json_object"}})
    assert actual.json()["choices"][0]["message"]["content"].startswith("{")


def test_in_responses(live):
    body = {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}}
    actual = live.client.post("/v1/responses", json=body).json()
    assert json.loads(actual["output"][0]["content"][0]["text"]) == {"n": 7, "s": "yes"}
    assert actual["text"]["format"]["schema"] == SCHEMA


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "("},
        {"guided_regex": ""},
        {"guided_regex": 1},
        {"guided_regex": "a" * 20_000},
        {"guided_regex": "(?<=a)b"},
        {"guided_regex": "\x00"},
        {"guided_grammar": "nothing"},
        {"guided_grammar": 'root ::= "a'},
        {"guided_grammar": ""},
        {"guided_grammar": 'notroot ::= "a"'},
        {"response_format": {"type": "xml"}},
        {"response_format": "json"},
        {"response_format": {}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": schema_format("x")},
        {"response_format": schema_format({"type": "nothing"})},
        {"response_format": schema_format({"$ref": "#/nowhere"})},
        {"response_format": schema_format({"$ref": "http://127.0.0.1:1/schema.json"})},
        {"response_format": schema_format({"$ref": "file:///etc/passwd"})},
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        {"guided_grammar": 'root ::= "a"', "guided_regex": "a"},
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_invalid_formats(refused, path, fields):
    refused(path, {**(CHAT if path == PATH else {"prompt": "x"}), **fields})


@pytest.fixture(scope="module")
def impatient(byte_tokenizer):
    with LiveServer(FakeEngine(byte_tokenizer), ServerSettings(grammar_seconds=0.5)) as live:
        yield live


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "(a{1,1000}){1,1000}"},
        {"guided_regex": "((((((((a?){9}){9}){9}){9}){9}){9}){9}){9}"},
        {"response_format": schema_format({"type": "array", "minItems": 10**6, "maxItems": 10**6})},
        {"response_format": schema_format({"type": "string", "pattern": "^(a+)+$" * 100})},
        {"guided_grammar": "root ::= " + " ".join(["[a-z]"] * 20_000)},
    ],
)
def test_slow_grammars_do_not_affect_others(impatient, fields):
    """Some of these compile and some are rejected: either at once or within the limit, and other requests are answered
    meanwhile."""
    live = impatient
    with ThreadPoolExecutor(1) as pool:
        hard = pool.submit(live.client.post, "/v1/completions", json={"prompt": "x", "max_tokens": 4, **fields})
        slowest = 0.0
        while not hard.done():
            began = time.perf_counter()
            assert live.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4}).status_code == 200
            slowest = max(slowest, time.perf_counter() - began)
            time.sleep(0.05)
        assert hard.result().status_code in (200, 400), hard.result().text
        if hard.result().status_code == 400:
            assert_error(hard.result(), 400)
    assert slowest < 5  # less than the grammar's limit: others do not wait for it


def test_deeply_nested_schemas(refused):
    schema: dict = {"type": "integer"}
    for _ in range(45):
        schema = {"type": "object", "properties": {"a": schema}}
    refused("/v1/completions", {"prompt": "x", "response_format": schema_format(schema)})
