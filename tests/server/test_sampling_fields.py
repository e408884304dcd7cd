"""Sampling parameters: valid ranges; an invalid one is a 400 before the engine sees the request. The server is strict."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

CHAT = {"messages": [{"role": "user", "content": "x"}]}
TEXT = {"prompt": "x"}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
HUGE = ["NaN", "Infinity", "-Infinity", "1e999", "1e308", "-1e308", "true", '"1"', '"0.5"', "[1]", "{}"]
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("max_tokens", "n", "seed", "top_k", "min_tokens", "priority")


@pytest.fixture(scope="module")
def shared_server(byte_tokenizer):
    with LiveServer(FakeEngine(byte_tokenizer), ServerSettings(strict=True)) as live:
        yield live


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NUMBERS + INTEGERS)
def test_values_that_are_not_numbers(live, refused, path, name):
    seen = len(live.engine.seen)
    rest = json.dumps(PATHS[path])[1:]
    for value in HUGE:
        refused(path, f'{{"{name}": {value}, {rest}')
    for value in ("1.5", "1e3") if name in INTEGERS else ():
        refused(path, f'{{"{name}": {value}, {rest}', 400, name)
    assert len(live.engine.seen) == seen


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name,values",
    [
        ("n", [0, -1, 33, 128, 2**31, 2**63, 2**64, 10**400]),
        ("max_tokens", [-2, 2**31, 2**63, 10**400]),
        ("seed", [-2, 2**64, 10**400]),
        ("top_k", [-2, 2**63]),
        ("top_p", [0, -0.1, 1.01]),
        ("min_p", [-0.1, 1.1]),
        ("temperature", [-0.1, 101]),
        ("repetition_penalty", [0, -1, 101]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("min_tokens", [-1, 2**63]),
        ("priority", [-1001, 1001]),
        ("stop", ["", [""], ["a"] * 17, ["a"] * 10_000, "a" * 1025, "a" * 900_000, [1], 1, {}]),
        ("stop_token_ids", [[-1], [261], [2**63], [True], ["1"], [1.5], [1] * 65, 1]),
        (
            "logit_bias",
            [
                {"-1": 1},
                {"261": 1},
                {"x": 1},
                {"1": 101},
                {"1": -101},
                {"1": True},
                {"1": "1"},
                {"1.5": 1},
                [],
                1,
                {"99999999999": 1},
                {str(i): 1 for i in range(1025)},
            ],
        ),
        ("stream", [1, "true", []]),
        ("ignore_eos", [1, "true"]),
    ],
)
def test_values_out_of_range(live, refused, path, name, values):
    seen = len(live.engine.seen)
    for value in values:
        refused(path, {name: value, **PATHS[path]})
    assert len(live.engine.seen) == seen


def test_fields_with_the_same_fault_are_named_together(refused):
    wrong = {**TEXT, "logit_bias": {"bad1": 1, "5": 1, "bad2": 1}, "top_k": -2}
    message = refused("/v1/completions", wrong, 400, "logit_bias.bad1").json()["error"]["message"]
    assert message.startswith("logit_bias.bad1, logit_bias.bad2: ")


def test_values_of_specific_routes(refused):
    for value in (-1, 21, 2**63, True, "1", 1.5):
        refused("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": value}, 400, "top_logprobs")
        refused("/v1/completions", {**TEXT, "logprobs": value}, 400, "logprobs")
    refused("/v1/chat/completions", {**CHAT, "top_logprobs": 1}, 400, "top_logprobs")
    refused("/v1/chat/completions", {**CHAT, "logprobs": 1}, 400, "logprobs")
    for value in (0, -2, 2**63, True):
        refused("/v1/chat/completions", {**CHAT, "max_completion_tokens": value}, 400, "max_completion_tokens")
        refused("/v1/responses", {"input": "x", "max_output_tokens": value}, 400, "max_output_tokens")
    for value in (0, 33, -1, 2**63):
        refused("/v1/completions", {**TEXT, "best_of": value}, 400, "best_of")
    refused("/v1/completions", {**TEXT, "n": 3, "best_of": 2}, 400, "best_of")
    refused("/v1/completions", {**TEXT, "best_of": 2, "stream": True}, 400, "best_of")
    refused("/v1/completions", {**TEXT, "min_tokens": 5, "max_tokens": 4}, 400, "min_tokens")
    refused("/v1/chat/completions", {**CHAT, "max_tokens": 0}, 400, "max_tokens")
    for path, rest in PATHS.items():
        refused(path, {**rest, "stream_options": {"include_usage": True}}, 400, "stream_options")
    refused("/v1/completions", {"prompt": ["x"] * 33, "n": 2}, 400, "n")


@pytest.mark.parametrize("path", PATHS)
def test_unknown_fields_are_named(refused, path):
    for name in (
        "tempreature",
        "__proto__",
    ):
        actual = refused(path, {name: 1, **PATHS[path]}, 400, name)
        assert name in actual.json()["error"]["message"]


@pytest.mark.parametrize("path", [*PATHS, "/v1/responses"])
def test_fields_that_change_nothing_are_ignored(client, path):
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
    }
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {**PATHS.get(path, {"input": "x"}), limit: 2, **harmless}
    assert client.post(path, json=body).status_code == 200
    assert client.post(path, json={**body, **{name: None for name in harmless}}).status_code == 200


def test_every_field_reaches_the_engine(live):
    body = {
        **TEXT,
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.25,
        "seed": 2**64 - 1,
        "stop": "zz",
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "6": 1.5},
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "skip_special_tokens": False,
        "logprobs": 20,
        "include_stop_str_in_output": True,
        "priority": 9,
    }
    assert live.client.post("/v1/completions", json=body).status_code == 200
    request = live.engine.seen[-1]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (7, 0, 0.5, 0, 0.25)
    assert (sampling.seed, sampling.stop, sampling.include_stop, sampling.stop_token_ids) == (2**64 - 1, ("zz",), True, (7,))
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-2, 2, 1.5)
    assert sampling.logit_bias == {5: -100, 6: 1.5} and (sampling.min_tokens, sampling.ignore_eos) == (3, True)
    assert (sampling.skip_special_tokens, sampling.logprobs, request.priority) == (False, 20, 9)


def test_null_equals_absent(live):
    names = (
        *NUMBERS,
        *INTEGERS,
        "stop",
        "logit_bias",
        "stop_token_ids",
        "stream",
        "ignore_eos",
        "logprobs",
        "echo",
        "suffix",
        "guided_regex",
        "guided_grammar",
        "response_format",
        "best_of",
    )
    assert live.client.post("/v1/completions", json={**TEXT, **{name: None for name in names}}).status_code == 200
    from deepseek_optimizer.engine.request import SamplingParams

    assert live.engine.seen[-1].sampling == SamplingParams(max_tokens=16)


def test_defaults_come_from_the_generation_config(make_server):
    live = make_server(ServerSettings(sampling={"temperature": 0.6, "top_p": 0.95}))
    live.client.post("/v1/completions", json={**TEXT, "top_p": 1})
    sampling = live.engine.seen[-1].sampling
    assert (sampling.temperature, sampling.top_p) == (0.6, 1)


def test_answers_to_one_prompt_have_different_seeds(live):
    live.client.post("/v1/completions", json={**TEXT, "n": 3, "seed": 2**64 - 1})
    assert [request.sampling.seed for request in live.engine.seen[-3:]] == [2**64 - 1, 0, 1]
