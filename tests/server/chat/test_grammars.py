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


SCHEMA_TEXT = json.dumps(SCHEMA)
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "sequence",
        "elements": [
            {"type": "const_string", "value": "<a>"},
            {"type": "json_schema", "json_schema": SCHEMA},
            {"type": "regex", "pattern": "x{2}"},
        ],
    },
}


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": SCHEMA},
        {"guided_json": SCHEMA_TEXT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA_TEXT, "whitespace_pattern": None}},
        {"json_schema": SCHEMA},
        {"json_schema": SCHEMA, "grammar": ""},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ],
)
def test_schemas_in_other_spellings(live, fields):
    assert json.loads(text_of(live, **fields)) == {"n": 7, "s": "yes"}


@pytest.mark.parametrize(
    "fields, pattern",
    [
        ({"guided_choice": ['a "b"\n', "é"]}, 'a "b"\n|é'),
        ({"guided_choice": ["only"]}, "only"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "a|b"),
        ({"grammar": 'root ::= "a" | "b"'}, "a|b"),
        ({"ebnf": 'root ::= "a" | "b"'}, "a|b"),
        ({"regex": "c{4}"}, "cccc"),
        ({"guided_grammar": 'start: "a" WORD\nWORD: "b" | "c"\n'}, "a(b|c)"),
        ({"response_format": TAG}, r'<a>\{"n": ?7, ?"s": ?"yes"\}xx'),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, r'<a>\{"n": ?7, ?"s": ?"yes"\}xx'),
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_other_forms_in_other_spellings(live, path, fields, pattern):
    assert re.fullmatch(pattern, text_of(live, path, **fields))


def test_structures_and_triggers(make_server):
    """The model writes any text until a trigger."""
    live = make_server(script=lambda request: "say <f>no</f> end")
    form = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": {"enum": [1]}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    assert text_of(live, "/v1/completions", response_format=form).startswith("say <f>1</f>")


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"json_schema": SCHEMA, "grammar": 'root ::= "a"'}, "grammar"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"guided_json": "{"}, "json_schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, None),
        ({"guided_choice": ["x"] * 1001}, "guided_choice"),
        ({"guided_grammar": 'start: "a'}, "grammar"),
        ({"guided_grammar": 'other: "a"'}, "grammar"),
        ({"response_format": {"type": "structural_tag"}}, None),
        ({"response_format": {"type": "structural_tag", "format": {"type": "token", "token": 1}}}, "structural_tag"),
        ({"structured_outputs": {"structural_tag": "{"}}, "structural_tag"),
    ],
)
def test_invalid_forms_in_other_spellings(refused, fields, param):
    refused("/v1/completions", {"prompt": "x", **fields}, 400, param)


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
