"""One answer through `generate` on a tiny plain Transformers model, as benchmarks request it from any model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_optimizer.bench.generate_answer import answer
from deepseek_optimizer.chat.conversation import prompt_ids

GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def pair(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = None  # random weights would sometimes end an answer
    return model, AutoTokenizer.from_pretrained(tiny_model)


def test_answer_streams_the_result_of_generate(pair):
    model, tokenizer = pair
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "Hello"}])
    pieces: list[str] = []
    reply = answer(model, tokenizer, ids, pieces.append, max_new_tokens=12, **GREEDY)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **GREEDY)[0, ids.shape[1] :]
    assert reply.ids == expected.tolist()
    assert reply.text == "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert (reply.prompt_tokens, reply.new_tokens, reply.finish_reason) == (ids.shape[1], 12, "length")
    assert reply.first_token_s > 0 and reply.tokens_per_s > 0


def test_answer_ends_with_the_end_token(pair):
    model, tokenizer = pair
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "Hello"}])
    free = answer(model, tokenizer, ids, lambda _: None, max_new_tokens=5, **GREEDY)
    model.generation_config.eos_token_id = [free.ids[0]]
    try:
        stopped = answer(model, tokenizer, ids, lambda _: None, max_new_tokens=1, **GREEDY)
    finally:
        model.generation_config.eos_token_id = None
    assert stopped.finish_reason == "stop" and stopped.ids == free.ids[:1]


def test_answer_fits_the_context(pair):
    model, tokenizer = pair
    ids = torch.full((1, 250), 65)
    assert answer(model, tokenizer, ids, lambda _: None, max_new_tokens=100, **GREEDY).new_tokens == 6
    with pytest.raises(ValueError, match="256 tokens leave no room"):
        answer(model, tokenizer, torch.full((1, 256), 65), lambda _: None, **GREEDY)
