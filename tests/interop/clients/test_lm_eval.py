"""lm-eval: generation, by completions and by chats. Loglikelihoods need a real model: tests/server."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from .conftest import MODEL

LIMITS = {"until": ["\n"], "max_gen_toks": 40, "do_sample": False}


@pytest.fixture(scope="module")
def url(start):
    return f"{start(lambda prompt: 'Hello!' + chr(10) + 'more').url}/v1"


def instances(prompts):
    return [Instance("generate_until", {}, (prompt, dict(LIMITS)), index) for index, prompt in enumerate(prompts)]


@pytest.mark.parametrize("batch", [1, 4])
def test_completions(url, batch):
    model = LocalCompletionsAPI(
        base_url=f"{url}/completions", model=MODEL, tokenizer_backend=None, tokenized_requests=False, batch_size=batch,
        num_concurrent=1, max_retries=1,
    )  # fmt: skip
    assert model.generate_until(instances(["one", "two", "three"]), disable_tqdm=True) == ["Hello!"] * 3


def test_chats(url):
    model = LocalChatCompletion(base_url=f"{url}/chat/completions", model=MODEL, num_concurrent=2, max_retries=1)
    chats = [model.apply_chat_template([{"role": "user", "content": text}]) for text in ("one", "two")]
    assert model.generate_until(instances(chats), disable_tqdm=True) == ["Hello!"] * 2
