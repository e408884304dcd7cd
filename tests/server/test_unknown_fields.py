"""Fields that the server does not know are ignored and named in a header; values of another JSON type are converted."""

from __future__ import annotations

import logging

import pytest

from deepseek_optimizer.server.http.ignored_fields import HEADER, IgnoredFields
from deepseek_optimizer.server.protocol.chat import ChatRequest
from deepseek_optimizer.server.protocol.completions import CompletionRequest
from deepseek_optimizer.server.protocol.responses import ResponsesRequest
from deepseek_optimizer.server.protocol.tolerance import MAX_IGNORED, parse_tolerantly
from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import assert_error

USER = {"role": "user", "content": "hi"}
CHAT = {"messages": [USER], "max_tokens": 2}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_field_is_ignored_and_named(client, path):
    plain = client.post(path, json=PATHS[path])
    actual = client.post(path, json={**PATHS[path], "frobnicate": {"a": [1]}})
    assert plain.status_code == actual.status_code == 200, actual.text
    assert HEADER not in plain.headers and actual.headers[HEADER] == "frobnicate"


def test_unknown_fields_of_parts_are_named_with_their_place(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x-mine": 1}, "cache": True}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]},
        {**USER, "timestamp": 1},
        {"role": "assistant", "content": "a", "timestamp": 2},
        USER,
    ]
    body = {**CHAT, "messages": messages, "tools": [tool], "tool_choice": "none", "response_format": {"type": "text", "x": 1}}
    actual = client.post("/v1/chat/completions", json=body)
    assert actual.status_code == 200, actual.text
    expected = {"messages.content.cache_control", "messages.timestamp", "tools.function.cache", "response_format.x"}
    assert set(actual.headers[HEADER].split(", ")) == expected


def test_options_that_the_template_does_not_have_are_ignored(live):
    options = {"enable_thinking": False, "chat_template": "{{ 1 }}", "messages": "x"}
    actual = live.client.post("/v1/chat/completions", json={**CHAT, "chat_template_kwargs": options})
    assert actual.status_code == 200 and "chat_template_kwargs.enable_thinking" in actual.headers[HEADER]
    prompt = live.engine.seen[-1].prompt
    live.client.post("/v1/chat/completions", json=CHAT)
    assert prompt == live.engine.seen[-1].prompt


def test_errors_and_streams_name_ignored_fields_too(client):
    actual = client.post("/v1/completions", json={"prompt": "hi", "frobnicate": 1, "model": "other"})
    assert_error(actual, 404)
    assert actual.headers[HEADER] == "frobnicate"
    with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "frobnicate": 1}) as response:
        assert response.headers[HEADER] == "frobnicate"
        response.read()


def test_an_invalid_field_beside_an_unknown_one_is_the_error(refused):
    message = refused("/v1/completions", {"prompt": "hi", "frobnicate": 1, "top_p": 2}, 400, "top_p").text
    assert "frobnicate" not in message


def test_an_unknown_field_of_a_form_is_ignored(client):
    fields = {"purpose": "user_data", "color": "red"}
    actual = client.post("/v1/files", files={"file": ("a.txt", "text")}, data=fields)
    assert actual.status_code == 200 and actual.headers[HEADER] == "color"
    client.delete(f"/v1/files/{actual.json()['id']}")


def test_a_strict_server_refuses_them(make_server):
    live = make_server(ServerSettings(strict=True))
    for body in ({"frobnicate": 1}, {"temperature": "0.7"}):
        assert_error(live.client.post("/v1/completions", json={"prompt": "hi", **body}), 400, next(iter(body)))
    form = live.client.post("/v1/files", files={"file": ("a.txt", "text")}, data={"purpose": "user_data", "color": "red"})
    assert_error(form, 400, "color")
    assert live.client.get("/openapi.json").json()["components"]["schemas"]["TextPart"]["additionalProperties"] is False


def test_the_schema_allows_unknown_fields(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert not any("additionalProperties" in schemas[name] for name in ("ChatRequest", "TextPart", "Tool", "StreamOptions"))


def test_types_are_converted_as_by_vllm(live):
    body = {"prompt": "hi", "temperature": "0.5", "max_tokens": 3.0, "seed": "7", "top_k": "5", "ignore_eos": "false"}
    assert live.client.post("/v1/completions", json=body).status_code == 200
    sampling = live.engine.seen[-1].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed, sampling.top_k) == (0.5, 3, 7, 5)
    assert sampling.ignore_eos is False


@pytest.mark.parametrize("field, value", [("max_tokens", 1.5), ("temperature", "warm"), ("temperature", "nan"), ("stop", 1)])
def test_values_that_cannot_be_converted(refused, field, value):
    refused("/v1/completions", {"prompt": "hi", field: value}, 400)


def test_the_number_of_answers_is_limited_whatever_its_type(refused):
    for n in ("4", 4.0, " 4 ", "4.0"):
        refused("/v1/completions", {"prompt": ["x"] * 20, "n": n}, 400, "n")


def test_at_most_32_names_are_collected():
    body = {"prompt": "hi", **{f"field{i}": 1 for i in range(1000)}}
    _, names = parse_tolerantly(CompletionRequest, body)
    assert names == [f"field{i}" for i in range(MAX_IGNORED)]


def test_known_fields_under_other_names_are_not_unknown():
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "mine": 1}, "other": 1}}
    _, names = parse_tolerantly(ChatRequest, {"messages": [USER], "response_format": schema})
    assert names == ["response_format.json_schema.other"]
    _, names = parse_tolerantly(ResponsesRequest, {"input": [{**USER, "other": 1}]})  # whose `type` is added before validation
    assert names == ["input.other"]


def test_the_header_is_short_and_harmless():
    report = IgnoredFields()
    hostile = report.report(["a\r\nSet-Cookie: x", "naïve, field", "y" * 10_000])
    assert hostile == f"a??Set-Cookie??x, na?ve??field, {'y' * 64}"
    many = report.report([f"name{i}" for i in range(32)])
    assert many.endswith("name15, ...") and len(report.report([f"{i}{'y' * 1000}" for i in range(32)])) < 1200


def test_each_name_is_logged_once_and_their_number_is_bounded(caplog):
    report = IgnoredFields()
    with caplog.at_level(logging.INFO, "deepseek_optimizer.server"):
        for _ in range(3):
            report.report(["color"])
        assert len(caplog.messages) == 1 and "color" in caplog.messages[0]
        for i in range(1000):
            report.report([f"name{i}"])
    assert len(caplog.messages) == 200
