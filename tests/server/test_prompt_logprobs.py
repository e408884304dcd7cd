"""Log probabilities of prompts and token ids, as evaluation harnesses read them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
PROMPT = "a prompt of several blocks, so that some of them come from the cache; " * 2


@pytest.fixture(scope="module")
def right(tiny_model):
    """right(ids) -> log softmax of the model's logits in float64, [n, V]."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).float()

    def of(ids):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()

    return of


def ask(live, path=TEXT, **body):
    actual = live.client.post(path, json={"temperature": 0, "max_tokens": 1, "ignore_eos": True, **body})
    assert actual.status_code == 200, actual.text
    return actual.json()


def events(live, path=TEXT, **body):
    text = live.client.post(path, json={"temperature": 0, "ignore_eos": True, "stream": True, **body}).text
    return [json.loads(event[6:]) for event in text.split("\n\n")[:-2]]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_with_logprobs_as_lm_eval_reads_it(tiny_server, right, tiny_model, max_tokens):
    """`local-completions` sums the token_logprobs after the context and compares with the largest of top_logprobs."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    contexts, ends = ["hello", PROMPT, PROMPT], [" world", "and this", "or that"]
    prompts = [tokenizer(c + e)["input_ids"] for c, e in zip(contexts, ends, strict=True)]
    body = {"prompt": prompts, "logprobs": 1, "echo": True, "max_tokens": max_tokens, "seed": 1234}
    choices = ask(tiny_server, **body)["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        logprobs = choice["logprobs"]
        text = prompt + tokenizer(choice["text"])["input_ids"][len(prompt) :]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(prompt) + max_tokens
        assert len(logprobs["top_logprobs"]) == len(logprobs["text_offset"]) == len(prompt) + max_tokens
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        expected = right(prompt)
        for n in range(1, len(prompt)):
            assert logprobs["token_logprobs"][n] == pytest.approx(expected[n - 1, prompt[n]], abs=1e-4)
            best = max(logprobs["top_logprobs"][n].values())
            assert best == pytest.approx(expected[n - 1].max(), abs=1e-4)
            assert (best == logprobs["token_logprobs"][n]) == (expected[n - 1].argmax() == prompt[n])
        assert choice["text"].startswith(tokenizer.decode(prompt)) and len(text) >= len(prompt)
        if max_tokens == 0:
            assert choice["finish_reason"] == "length" and choice["text"] == tokenizer.decode(prompt)


def test_the_answer_is_the_same_with_and_without_log_probabilities(tiny_server):
    plain = ask(tiny_server, prompt=PROMPT, max_tokens=20)["choices"][0]["text"]
    for body in ({"echo": True, "logprobs": 2}, {"prompt_logprobs": 3}, {"return_token_ids": True}):
        choice = ask(tiny_server, prompt=PROMPT, max_tokens=20, **body)["choices"][0]
        assert choice["text"] == (PROMPT + plain if "echo" in body else plain)


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_prompt_logprobs_in_vllms_format(tiny_server, right, path):
    rest = {"prompt": PROMPT} if path == TEXT else {"messages": MESSAGES}
    actual = ask(tiny_server, path, prompt_logprobs=2, return_token_ids=True, max_tokens=3, **rest)
    choice = actual["choices"][0]
    holder = choice if path == TEXT else actual
    ids, values = holder["prompt_token_ids"], holder["prompt_logprobs"]
    assert len(values) == len(ids) and values[0] is None and len(choice["token_ids"]) == 3
    expected = right(ids)
    for n in range(1, len(ids)):
        row, entries = expected[n - 1], values[n]
        order = np.argsort(-row)
        assert set(entries) == {str(ids[n]), *map(str, order[:2])}
        for token, entry in entries.items():
            assert entry["logprob"] == pytest.approx(row[int(token)], abs=1e-4)
            assert order[entry["rank"] - 1] == int(token) and isinstance(entry["decoded_token"], str)


def test_token_ids_and_log_probabilities_in_streams(tiny_server):
    body = {"prompt": "hello", "max_tokens": 20, "return_token_ids": True, "temperature": 1, "seed": 2}
    whole = ask(tiny_server, **body)["choices"][0]
    chunks = [chunk["choices"][0] for chunk in events(tiny_server, **body)]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert len(chunks) > 1 and not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    assert sum((chunk["token_ids"] for chunk in chunks), []) == whole["token_ids"]
    whole = ask(tiny_server, CHAT, messages=MESSAGES, max_tokens=8, return_token_ids=True)
    chunks = events(tiny_server, CHAT, messages=MESSAGES, max_tokens=8, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    ids = [chunk["choices"][0].get("token_ids", []) for chunk in chunks]
    assert sum(ids, []) == whole["choices"][0]["token_ids"]
    body = {"prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 4}
    whole = ask(tiny_server, **body)["choices"][0]["logprobs"]
    chunks = [chunk["choices"][0]["logprobs"] for chunk in events(tiny_server, **body)]
    for name in ("tokens", "text_offset"):
        assert sum((chunk[name] for chunk in chunks if chunk), []) == whole[name]
    for name in ("token_logprobs", "top_logprobs"):
        assert sum((chunk[name] for chunk in chunks if chunk), [])[0] is whole[name][0] is None
    (chunk,) = [chunk["choices"][0] for chunk in events(tiny_server, **{**body, "max_tokens": 0})]
    assert chunk["text"] == "hello" and chunk["finish_reason"] == "length" and chunk["logprobs"]["token_logprobs"][0] is None


def test_offsets_into_the_echoed_text(tiny_server):
    choice = ask(tiny_server, prompt="naïve 😀!", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["text_offset"][-1] == len("naïve 😀!") - 1
    assert logprobs["top_logprobs"][0] is None and all(len(top) == 1 for top in logprobs["top_logprobs"][1:])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)


@pytest.mark.parametrize("max_tokens", [0, 30])
def test_a_prompt_of_one_token(tiny_server, max_tokens):
    body = {"prompt": [65], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    whole = ask(tiny_server, **body)["choices"][0]["logprobs"]
    assert whole["token_logprobs"][0] is None and len(whole["tokens"]) == 1 + max_tokens
    chunks = [chunk["choices"][0]["logprobs"] for chunk in events(tiny_server, **body)]
    streamed = sum((chunk["token_logprobs"] for chunk in chunks if chunk), [])
    assert streamed[0] is None and streamed[1:] == pytest.approx(whole["token_logprobs"][1:], abs=1e-4)


def test_cached_prefixes_are_apart_by_salt(tiny_server):
    prompt = [7] * 100

    def cached(**body):
        return ask(tiny_server, prompt=prompt, **body)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 96, 0]
    assert cached() == 0 and cached() == 96


def test_tokens_as_token_ids(client):
    body = {"prompt": "x", "logprobs": 1, "echo": True, "return_tokens_as_token_ids": True, "max_tokens": 2}
    logprobs = client.post(TEXT, json=body).json()["choices"][0]["logprobs"]
    assert all(token.startswith("token_id:") for token in logprobs["tokens"])
    assert all(name.startswith("token_id:") for top in logprobs["top_logprobs"][1:] for name in top)


@pytest.mark.parametrize(
    "path, body", [(TEXT, {"prompt": "x"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})]
)
def test_fields_that_are_not_asked_for_are_null(client, path, body):
    answer = client.post(path, json={**body, "max_tokens": 2}).json()
    prompt = answer if "message" in answer["choices"][0] else answer["choices"][0]
    assert prompt["prompt_token_ids"] is None and prompt["prompt_logprobs"] is None
    assert answer["choices"][0]["token_ids"] is None


def test_prompts_are_shortened_on_request(live, refused):
    def prompt(**fields):
        live.client.post(TEXT, json={"max_tokens": 6, **fields}).raise_for_status()
        return live.engine.seen[-1].prompt

    assert prompt(prompt=[1, 2, 3, 4], truncate_prompt_tokens=2) == [3, 4]
    assert prompt(prompt=[1, 2, 3, 4], truncate_prompt_tokens=2, truncation_side="right") == [1, 2]
    assert prompt(prompt=[1, 2, 3, 4], truncate_prompt_tokens=9) == [1, 2, 3, 4]
    assert len(prompt(prompt="x" * 10_000, truncate_prompt_tokens=-1)) == 4096 - 6
    for wrong in (0, -2, 4097):
        refused(TEXT, {"prompt": "x", "truncate_prompt_tokens": wrong}, 400, "truncate_prompt_tokens")
    body = {"prompt": "abcdef", "truncate_prompt_tokens": 2, "echo": True, "max_tokens": 0}
    assert live.client.post(TEXT, json=body).json()["choices"][0]["text"] == "ef"


def test_limits(refused, make_server):
    refused(TEXT, {"prompt": "x", "prompt_logprobs": 21}, 400, "prompt_logprobs")
    refused(TEXT, {"prompt": "x", "prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs")
    refused(TEXT, {"prompt": "x", "cache_salt": ""}, 400, "cache_salt")
    refused(TEXT, {"prompt": [[1] * 4000] * 4, "prompt_logprobs": 20}, 400, "prompt_logprobs")
    refused(TEXT, {"prompt": [[1] * 4000] * 4, "logprobs": 20, "echo": True}, 400, "logprobs")
    live = make_server()
    body = {"prompt": [[1] * 4000] * 3, "logprobs": 20, "echo": True, "max_tokens": 0}
    assert len(live.client.post(TEXT, json=body).json()["choices"]) == 3
