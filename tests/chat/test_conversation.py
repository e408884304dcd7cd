"""Answers and conversations, on a tiny model in plain Transformers: this part takes any model with `generate`."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_optimizer.chat.conversation import Conversation, answer, prompt_ids

GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def pair(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = None  # random weights: let no answer end by chance
    return model, AutoTokenizer.from_pretrained(tiny_model)


def test_answer_streams_what_generate_returns(pair):
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


def test_answer_keeps_to_the_context(pair):
    model, tokenizer = pair
    ids = torch.full((1, 250), 65)
    assert answer(model, tokenizer, ids, lambda _: None, max_new_tokens=100, **GREEDY).new_tokens == 6
    with pytest.raises(ValueError, match="256 tokens leave no room"):
        answer(model, tokenizer, torch.full((1, 256), 65), lambda _: None, **GREEDY)


def test_raw_prompts_bypass_the_template(pair):
    _, tokenizer = pair
    message = [{"role": "user", "content": "Hi"}]
    assert tokenizer.decode(prompt_ids(tokenizer, message)[0]) == "<|user|>Hi<|end|><|assistant|>"
    assert tokenizer.decode(prompt_ids(tokenizer, message, raw=True)[0]) == "Hi"


def test_conversation_keeps_history(pair, tmp_path):
    model, tokenizer = pair
    talk = Conversation(model, tokenizer, system="Be brief.", generation={"max_new_tokens": 4, **GREEDY})
    first = talk.say("One", lambda _: None)
    second = talk.say("Two", lambda _: None)
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.messages[2]["content"] == first.text
    assert second.prompt_tokens == prompt_ids(tokenizer, talk.messages[:-1]).shape[1]
    talk.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == talk.messages
    talk.undo()
    assert [m["content"] for m in talk.turns] == ["One", first.text]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_an_interrupted_answer_is_kept_and_a_failed_one_is_not(pair):
    model, tokenizer = pair
    talk = Conversation(model, tokenizer, generation={"max_new_tokens": 50, **GREEDY})
    asked = iter([False, False, False, True])
    reply = talk.say("One", lambda _: None, lambda: next(asked))
    assert reply.finish_reason == "interrupted" and reply.new_tokens == 3
    assert talk.turns[-1] == {"role": "assistant", "content": reply.text}
    before = list(talk.turns)
    with pytest.raises(ValueError, match="no room"):
        talk.say("x" * 300, lambda _: None)
    assert talk.turns == before


def test_conversation_needs_a_template(pair):
    model, tokenizer = pair
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(model, bare)
