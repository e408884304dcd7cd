"""Beam search and best_of, against a search over Transformers' logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.live_server import assert_error, wait_for

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).float()


def search(model, prompt, width, max_tokens, penalty, eos):
    """vLLM's search: (token ids, sum of log probabilities), best first."""

    def score(beam):
        tokens, total = beam
        return total / (len(prompt) + len(tokens) - (tokens[-1:] == [eos])) ** penalty

    beams, ended = [([], 0.0)], []
    for _ in range(max_tokens):
        longer = []
        for tokens, total in beams:
            with torch.no_grad():
                row = torch.log_softmax(model(torch.tensor([prompt + tokens])).logits[0, -1].double(), -1).numpy()
            longer += [([*tokens, int(token)], total + row[token]) for token in np.argsort(-row)[: 2 * width]]
        ended += [beam for beam in longer if beam[0][-1] == eos]
        beams = sorted((beam for beam in longer if beam[0][-1] != eos), key=score, reverse=True)[:width]
    return sorted(ended + beams, key=score, reverse=True)[:width]


@pytest.mark.parametrize("width,penalty", [(1, 1.0), (3, 1.0), (4, 0.0), (2, 2.0)])
def test_beams_equal_the_reference(tiny_server, model, width, penalty):
    for prompt in ([5, 6, 7], list(range(40, 90))):
        body = {"prompt": prompt, "n": width, "use_beam_search": True, "length_penalty": penalty, "max_tokens": 6}
        answer = tiny_server.client.post(TEXT, json={**body, "return_token_ids": True, "logprobs": 0}).json()
        expected = search(model, prompt, width, 6, penalty, tiny_server.engine.tokenizer.eos_token_id)
        for choice, (tokens, total) in zip(answer["choices"], expected, strict=True):
            assert choice["token_ids"] == tokens
            assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(total, abs=1e-3)
            assert choice["finish_reason"] == ("stop" if tokens[-1] in tiny_server.engine.eos else "length")
        assert answer["usage"]["completion_tokens"] == sum(len(tokens) for tokens, _ in expected)


def test_beams_of_a_chat(tiny_server):
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "use_beam_search": True, "max_tokens": 4}
    choices = tiny_server.client.post(CHAT, json={**body, "return_token_ids": True, "ignore_eos": True}).json()["choices"]
    assert len(choices) == 2 and choices[0]["token_ids"] != choices[1]["token_ids"]
    assert all(len(choice["token_ids"]) == 4 and choice["finish_reason"] == "length" for choice in choices)


def test_refused_with_beam_search(tiny_server):
    for body in ({"n": 11}, {"stream": True}, {"stop": "x"}, {"prompt_logprobs": 1}, {"guided_regex": "a"}, {"best_of": 3}):
        assert_error(tiny_server.client.post(TEXT, json={"prompt": "x", "use_beam_search": True, **body}), 400)
    assert_error(tiny_server.client.post(TEXT, json={"prompt": [1] * 300, "use_beam_search": True}), 400, "prompt")
    wait_for(lambda: tiny_server.engine.admitted == 0)


def test_best_of_returns_the_most_likely(tiny_server):
    body = {"prompt": "hello", "seed": 3, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
    every = tiny_server.client.post(TEXT, json={**body, "n": 5}).json()["choices"]
    means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in every]
    best = sorted(range(5), key=lambda n: -means[n])[:2]
    answer = tiny_server.client.post(TEXT, json={**body, "n": 2, "best_of": 5, "logprobs": None}).json()
    assert [choice["text"] for choice in answer["choices"]] == [every[n]["text"] for n in best]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1] and answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 40
