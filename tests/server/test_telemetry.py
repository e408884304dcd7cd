"""llama-server's `timings`, `prompt_progress` and `__verbose` in answers of all protocols that generate text."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.engine.request import Output
from deepseek_optimizer.server.chat.timings import native_timings

CHAT, MESSAGES = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
BODIES = {
    CHAT: {"messages": MESSAGES, "max_tokens": 6},
    "/v1/completions": {"prompt": "hello", "max_tokens": 6},
    "/v1/responses": {"input": "hello", "max_output_tokens": 6},
    "/completion": {"prompt": "hello", "n_predict": 6},
}


def events(client, path, **body):
    response = client.post(path, json={**BODIES[path], **body, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("path", BODIES)
def test_progress_in_a_stream(live, path):
    plain = events(live.client, path)
    actual = events(live.client, path, return_progress=True, timings_per_token=True)
    progress = [event["prompt_progress"] for event in actual if "prompt_progress" in event]
    total = len(live.engine.seen[-1].prompt)
    assert [one["processed"] for one in progress] == [0, total // 2, total]
    assert {one["total"] for one in progress} == {total} and progress[0]["cache"] == progress[0]["time_ms"] == 0
    assert not any("prompt_progress" in event or ("timings" in event and path != "/completion") for event in plain)
    first = next(event["timings"] for event in actual if "prompt_progress" in event)
    assert first["prompt_n"] == first["prompt_ms"] == first["predicted_n"] == 0
    assert sum("timings" in event for event in actual) > 3 and actual[-1]["timings"]["predicted_n"] == 6
    assert actual[-1]["timings"]["prompt_n"] == total


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/completion"])
def test_timings_of_a_whole_answer(live, path):
    assert "timings" not in live.client.post(path, json=BODIES[path]).json()
    timings = live.client.post(path, json={**BODIES[path], "timings_per_token": True, "return_progress": True}).json()[
        "timings"
    ]
    assert timings["predicted_n"] == 6 and timings["prompt_per_second"] > 0
    assert not live.engine.seen[-1].progress


def test_the_first_chunk_of_a_chat_has_a_role_and_no_timings(live):
    actual = events(live.client, CHAT, timings_per_token=True, stream_options={"include_usage": True})
    assert actual[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""} and "timings" not in actual[0]
    assert actual[-1]["choices"] == [] and actual[-1]["usage"]["completion_tokens"] == actual[-1]["timings"]["predicted_n"] == 6
    roles = [choice for event in events(live.client, CHAT, return_progress=True) for choice in event["choices"]]
    assert [choice["delta"].get("role") for choice in roles].count("assistant") == 1


def test_several_answers_have_progress_of_their_own(live):
    actual = events(live.client, CHAT, n=2, return_progress=True)
    seen = [event["choices"][0]["index"] for event in actual if "prompt_progress" in event]
    assert sorted(seen) == [0, 0, 0, 1, 1, 1]


def test_the_prompt_of_a_chat(live):
    answer = live.client.post(CHAT, json={**BODIES[CHAT], "verbose": True}).json()
    assert answer["__verbose"] == {"prompt": "<|user|>hello<|end|><|assistant|>"}
    assert "__verbose" not in live.client.post(CHAT, json={**BODIES[CHAT], "verbose": False}).json()
    verbose = [event for event in events(live.client, CHAT, verbose=True) if "__verbose" in event]
    assert len(verbose) == 1 and verbose[0]["choices"][0]["finish_reason"] == "length"


def test_invalid_fields(refused):
    refused("/v1/completions", {"prompt": "x", "timings_per_token": "often"}, 400, "timings_per_token")


def test_speeds_count_steps_and_not_the_first_token():
    output = Output("a", prompt_tokens=10, cached_tokens=4, completion_tokens=1)
    one = native_timings(output, 2.0, 0.0)
    assert (one["prompt_n"], one["cache_n"], one["prompt_per_second"], one["prompt_per_token_ms"]) == (6, 4, 3.0, 2e3 / 6)
    assert one["predicted_per_second"] == one["predicted_per_token_ms"] == 0
    output.completion_tokens = 5
    assert native_timings(output, 2.0, 2.0)["predicted_per_second"] == 2.0
