"""/v1/responses: items, events, and features that are rejected."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.server.protocol.base import parse
from deepseek_optimizer.server.protocol.responses import ResponsesRequest
from deepseek_optimizer.server.routes.responses import chat_messages


def events(response) -> list[dict]:
    assert response.status_code == 200, response.text
    result = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        result.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {result[-1]['type']}"
    return result


def test_a_stream_reports_each_step_and_ends_with_the_response(client):
    whole = client.post("/v1/responses", json={"input": "hi", "instructions": "Be brief"}).json()
    actual = events(client.post("/v1/responses", json={"input": "hi", "instructions": "Be brief", "stream": True}))
    kinds = [event["type"] for event in actual]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event["sequence_number"] for event in actual] == list(range(len(actual)))
    text = "".join(event["delta"] for event in actual if event["type"] == "response.output_text.delta")
    last = actual[-1]["response"]
    assert text == last["output"][0]["content"][0]["text"] == whole["output"][0]["content"][0]["text"]
    for response in (last, whole):
        response.pop("id"), response.pop("created_at"), response["output"][0].pop("id")
    assert last == whole and whole["status"] == "completed" and whole["usage"]["output_tokens"] > 5


def test_a_truncated_text_is_incomplete(client):
    body = {"input": "hi", "max_output_tokens": 3}
    whole = client.post("/v1/responses", json=body).json()
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    actual = events(client.post("/v1/responses", json={**body, "stream": True}))
    assert actual[-1]["type"] == "response.incomplete"


def test_log_probabilities_on_request(client):
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = client.post("/v1/responses", json=body).json()["output"][0]["content"][0]
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode().startswith(part["text"])
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])


@pytest.mark.parametrize(
    "body,param",
    [
        ({"input": "hi", "conversation": "conv_1"}, "conversation"),
        ({"input": "hi", "background": True, "store": False}, "background"),
        ({"input": "hi", "background": True, "stream": True}, "background"),
        ({"input": "hi", "truncation": "auto"}, "truncation"),
        ({"input": "hi", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://evil.example/a.png"}]}]}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "http://evil.example/a"}]}]}, None),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, None),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": [{}]}, None),
        ({"input": ["hi"]}, None),
        ({}, "input"),
        ({"input": "hi", "instructions": 1}, "instructions"),
        ({"input": "hi", "include": [1]}, "include.0"),
        ({"input": "hi", "tool_choice": "required"}, "tool_choice"),
        ({"input": "hi", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ],
)
def test_unsupported_fields(refused, body, param):
    refused("/v1/responses", body, 400, param)


def test_conversations_are_rejected_with_a_remedy(refused):
    actual = refused("/v1/responses", {"input": "hi", "conversation": "conv_1"})
    assert "previous_response_id" in actual.json()["error"]["message"]


def test_items_become_the_messages_of_a_chat():
    items = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]
    call = lambda id, name: {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}  # noqa: E731
    assert chat_messages(parse(ResponsesRequest, {"input": items, "instructions": "I"})) == [
        {"role": "system", "content": "I"},
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "I look", "reasoning_content": "hm", "tool_calls": [call("c1", "f"), call("c2", "g")]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]


def test_a_failure_in_the_middle_is_an_event(make_server):
    from deepseek_optimizer.server.settings import ServerSettings

    live = make_server(ServerSettings(request_seconds=8), step_seconds=0.02, script=lambda request: "x" * 3000)
    with live.client.stream("POST", "/v1/responses", json={"input": "hi", "stream": True}) as response:
        lines = response.iter_lines()
        while "delta" not in next(lines):
            pass
        live.call(live.engine.fail)
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert rest[-1]["type"] == "response.failed" and rest[-1]["response"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(rest)
