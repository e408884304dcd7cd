"""Ollama's API: chats, prompts, embeddings, and descriptions of the model."""

from __future__ import annotations

import copy
import json

import pytest

from deepseek_optimizer.server.protocol.base import parse
from deepseek_optimizer.server.protocol.ollama.requests import OllamaChatRequest
from deepseek_optimizer.server.protocol.ollama.to_openai import chat_request
from support.chats import HERMES, THINKING, WEATHER
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

USER = [{"role": "user", "content": "weather in Rom?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(byte_tokenizer, grammars):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES

    def script(request):
        prompt = tokenizer.decode(request.prompt)
        return CALL if "<tools>" in prompt and "sunny" not in prompt else "It is sunny. END of it"

    with LiveServer(FakeEngine(tokenizer, script=script), grammars=grammars) as live:
        yield live


def lines(live, path="/api/chat", **body) -> list[dict]:
    response = live.client.post(path, json=body)
    assert response.status_code == 200 and response.headers["content-type"] == "application/x-ndjson", response.text
    return [json.loads(line) for line in response.text.splitlines()]


def whole(live, path="/api/chat", status=200, **body) -> dict:
    response = live.client.post(path, json={"stream": False, **body})
    assert response.status_code == status, response.text
    return response.json()


def test_a_chat_streams_by_default(server):
    stream = lines(server, model="fake-model:latest", messages=USER)
    assert all(not line["done"] for line in stream[:-1]) and stream[-1]["done"]
    text = "".join(line["message"]["content"] for line in stream)
    answer = whole(server, messages=USER)
    assert text == answer["message"]["content"] == "It is sunny. END of it"
    for last in (stream[-1], answer):
        assert last["done_reason"] == "stop" and last["eval_count"] > 5 and last["prompt_eval_count"] > 5
        assert last["total_duration"] >= last["eval_duration"] >= 0 and last["model"] == "fake-model"


def test_its_tag_may_end_a_model_s_name_in_every_protocol(server):
    """Clients take the names from /api/tags."""
    (name,) = [model["name"] for model in server.client.get("/api/tags").json()["models"]]
    assert name == "fake-model:latest" and whole(server, messages=USER, model=name)["done"]
    answer = whole(server, "/v1/chat/completions", messages=USER, model=name)
    assert answer["model"] == "fake-model" and server.client.get(f"/v1/models/{name}").status_code == 200
    for other in ("fake-model:7b", "other:latest", ":latest"):
        assert whole(server, "/v1/chat/completions", 404, messages=USER, model=other)["error"]["param"] == "model"


def test_options(server):
    options = {"num_predict": 3, "num_ctx": 4096, "seed": -1, "temperature": 0, "repeat_penalty": 1.1, "top_k": 5, "unknown": 1}
    answer = whole(server, messages=USER, options=options, keep_alive="5m")
    assert answer["done_reason"] == "length" and answer["eval_count"] == 3
    sampling = server.engine.seen[-1].sampling
    assert (sampling.temperature, sampling.repetition_penalty, sampling.top_k, sampling.seed) == (0, 1.1, 5, None)
    assert whole(server, messages=USER, options={"stop": ["END"], "num_predict": -1})["message"]["content"] == "It is sunny. "


def test_tools(server):
    answer = whole(server, messages=USER, tools=[WEATHER])
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"index": 0, "name": "weather", "arguments": {"city": "Rom"}}
    stream = lines(server, messages=USER, tools=[WEATHER])
    assert [line["message"]["tool_calls"][0]["function"] for line in stream if "tool_calls" in line["message"]] == [
        call["function"]
    ]
    messages = [*USER, answer["message"], {"role": "tool", "tool_name": "weather", "content": "sunny"}]
    assert whole(server, messages=messages, tools=[WEATHER])["message"]["content"].startswith("It is sunny")


def test_json_and_schemas(server):
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    assert json.loads(whole(server, messages=USER, format=schema)["message"]["content"]) == {"n": 7}
    assert json.loads(whole(server, "/api/generate", prompt="x", format=schema)["response"]) == {"n": 7}
    text = whole(server, messages=USER, format="json", options={"num_predict": 8})["message"]["content"]
    assert text.lstrip().startswith("{")


def test_thinking(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = THINKING
    with LiveServer(FakeEngine(tokenizer, script=lambda request: "<think>\nhm\n</think>\n\nfine")) as live:
        assert whole(live, messages=USER)["message"] == {"role": "assistant", "content": "fine", "thinking": "hm"}
        assert whole(live, messages=USER, think=False)["message"] == {"role": "assistant", "content": "fine"}
        assert live.engine.tokenizer.decode(live.engine.seen[-1].prompt).endswith("<think></think>")
        stream = lines(live, "/api/generate", prompt="x", think=True)
        assert "".join(line.get("thinking", "") for line in stream) == "hm"
        assert "".join(line["response"] for line in stream) == "fine"


def test_prompts(server):
    answer = whole(server, "/api/generate", prompt="hello", system="Be brief")
    assert answer["response"] == "It is sunny. END of it" and "message" not in answer
    prompt = server.engine.tokenizer.decode(server.engine.seen[-1].prompt)
    assert prompt == "<|system|>Be brief<|end|><|user|>hello<|end|><|assistant|>"
    assert whole(server, "/api/generate", prompt="hello", raw=True)["response"] == "It is sunny. END of it"
    assert server.engine.tokenizer.decode(server.engine.seen[-1].prompt) == "hello"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_loading(server, path):
    asked = len(server.engine.seen)
    assert server.client.post(path, json={"model": "fake-model"}).json()["done_reason"] == "load"
    assert server.client.post(path, json={"model": "fake-model", "keep_alive": 0}).json()["done_reason"] == "unload"
    assert len(server.engine.seen) == asked


def test_embeddings(server):
    answer = server.client.post("/api/embed", json={"input": ["a", "bb"]}).json()
    assert [sum(x * x for x in vector) for vector in answer["embeddings"]] == pytest.approx([1, 1])
    assert answer["prompt_eval_count"] == 3
    older = server.client.post("/api/embeddings", json={"prompt": "a"}).json()
    assert older["embedding"] == answer["embeddings"][0]
    assert len(server.client.post("/api/embed", json={"input": "a"}).json()["embeddings"]) == 1


def test_the_model(server):
    (model,) = server.client.get("/api/tags").json()["models"]
    assert model["name"] == model["model"] == "fake-model:latest" and len(model["digest"]) == 64
    assert server.client.get("/api/ps").json()["models"][0]["name"] == model["name"]
    assert server.client.get("/api/version").json()["version"].count(".") == 2
    shown = server.client.post("/api/show", json={"model": model["name"]}).json()
    assert shown["capabilities"] == ["completion", "tools"] and "tool_call" in shown["template"]
    assert shown["model_info"][f"{shown['model_info']['general.architecture']}.context_length"] == 4096


@pytest.mark.parametrize(
    "path,body,words",
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ("/api/chat", {"messages": [{"role": "poet", "content": "x"}]}, "role"),
        ("/api/generate", {"prompt": "x", "images": ["aGk="]}, "images"),
        ("/api/generate", {"prompt": "x", "context": [1]}, "/api/chat"),
        ("/api/generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, "fill in"),
        ("/api/generate", {"prompt": "x", "options": {"temperature": "hot"}}, "temperature"),
        ("/api/embed", {}, "input"),
    ],
)
def test_errors(server, path, body, words):
    error = whole(server, path, 400, **body) if path != "/api/embed" else server.client.post(path, json=body).json()
    assert set(error) == {"error"} and words in error["error"]


def test_another_model(server):
    assert "error" in whole(server, status=404, model="llama3", messages=USER)
    assert "error" in whole(server, "/api/pull", status=404, model="llama3")


def test_the_model_that_is_served_need_not_be_pulled(server):
    assert lines(server, "/api/pull", model="fake-model", insecure=True) == [{"status": "success"}]
    assert whole(server, "/api/pull", name="fake-model:latest") == {"status": "success"}


def test_bodies_of_curl_but_not_of_other_pages(server):
    body = json.dumps({"messages": USER, "stream": False})
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert server.client.post("/api/chat", content=body, headers=form).status_code == 200
    assert server.client.post("/api/chat", content=body, headers={**form, "origin": "http://evil.example"}).status_code == 415
    assert server.client.post("/v1/chat/completions", content=body, headers=form).status_code == 415


def test_results_are_assigned_to_calls():
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    messages = [
        *USER,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_name": "g", "content": "2"},
        {"role": "tool", "content": "1"},
    ]
    chat = chat_request(parse(OllamaChatRequest, {"messages": messages}), False)
    assistant, second, first = chat.messages[1:]
    assert [call.id for call in assistant.tool_calls] == [first.tool_call_id, second.tool_call_id]
