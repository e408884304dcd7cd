"""Answers of an engine in this process."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from deepseek_optimizer import make_engine
from deepseek_optimizer.chat.conversation import Conversation, StopSignal, prompt_tokens
from deepseek_optimizer.chat.local import EngineSpeaker, answer, default_sampling, dialogue_tokens, room_of
from deepseek_optimizer.chat.sampling import sampling_params
from deepseek_optimizer.errors import BackendError, ConfigError, RequestError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning

HELLO = [{"role": "user", "content": "Hello"}]


def quiet(_: str) -> None:
    pass


def test_an_answer_equals_generate(endless, engine):
    model, tokenizer = endless
    tokens, pieces = prompt_tokens(tokenizer, HELLO), []
    reply = answer(engine, tokens, pieces.append, sampling_params(max_tokens=12))
    expected = model.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)[0, len(tokens) :].tolist()
    assert reply.ids == expected and reply.text == "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert (reply.prompt_tokens, reply.new_tokens, reply.finish_reason) == (len(tokens), 12, "length")
    assert reply.first_token_s > 0 and reply.tokens_per_s > 0


def test_a_stop_string_ends_it(engine):
    free = answer(engine, [1, 2, 3], quiet, sampling_params(max_tokens=12))
    stop = free.text[3:5]
    ended = answer(engine, [1, 2, 3], quiet, sampling_params(max_tokens=12, stop=stop))
    assert ended.finish_reason == "stop" and ended.text == free.text[: free.text.index(stop)]


def test_an_answer_fits_the_context(engine):
    assert answer(engine, [65] * 250, quiet, sampling_params(max_tokens=100)).new_tokens == 6
    with pytest.raises(RequestError, match="256 tokens leave no room"):
        answer(engine, [65] * 256, quiet, sampling_params())


def test_stopping_ends_it_within_a_step(engine):
    stop, pieces = StopSignal(), []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            stop.ask()

    reply = answer(engine, [1, 2, 3], write, sampling_params(max_tokens=200), stop)
    assert reply.finish_reason == "interrupted" and reply.text == "".join(pieces) and reply.new_tokens < 100
    assert engine.core.idle


def test_stopping_during_prefill(endless):
    """Ctrl-C arrives during a step, and a long prompt needs many steps before the first token."""
    engine, stop = make_engine(*endless, step_tokens=16), StopSignal()
    steps, run = [], engine.core.runner.step

    def step(*arguments, **others):
        steps.append(1)
        if len(steps) == 2:
            stop.ask()
        return run(*arguments, **others)

    engine.core.runner.step = step
    reply = answer(engine, [65] * 200, quiet, sampling_params(max_tokens=20), stop)
    assert (reply.finish_reason, reply.ids, len(steps)) == ("interrupted", [], 2)


def test_stopped_before_it_began(engine):
    stop = StopSignal()
    stop.ask()
    reply = answer(engine, [1, 2, 3], quiet, sampling_params(max_tokens=50), stop)
    assert reply.finish_reason == "interrupted" and reply.new_tokens == 1


def test_a_model_that_cannot_continue(engine):
    def broken(*_, **__):
        raise BackendError("no numbers")

    engine.core.runner.step = broken
    with pytest.raises(BackendError, match="no numbers"):
        answer(engine, [1, 2, 3], quiet, sampling_params())
    assert engine.core.idle


def test_later_turns_prefill_only_new_tokens(engine):
    talk = Conversation(EngineSpeaker(engine, sampling_params(max_tokens=4)), system="S" * 70)
    first, second = talk.say("One", quiet), talk.say("Two", quiet)
    assert first.cached_tokens == 0
    assert second.cached_tokens == 64  # two full blocks of the first prompt
    assert second.prompt_tokens == len(prompt_tokens(engine.tokenizer, talk.messages[:-1]))


def test_a_conversation_longer_than_the_context_continues(engine):
    talk = Conversation(EngineSpeaker(engine, sampling_params(max_tokens=30)), system="Be brief.")
    replies = [talk.say(f"Question {n}? " * 3, quiet) for n in range(8)]
    assert replies[0].dropped_messages == 0 < replies[-1].dropped_messages
    assert all(reply.new_tokens == 30 and reply.prompt_tokens + 30 <= room_of(engine) for reply in replies)
    assert len(talk.turns) == 16  # the history is complete


def test_remaining_messages_of_a_long_conversation(byte_tokenizer):
    messages = [{"role": "system", "content": "S" * 10}]
    for n in range(6):
        messages += [{"role": "user", "content": f"{n}" * 20}, {"role": "assistant", "content": "A" * 20}]
    messages.append({"role": "user", "content": "last"})
    tokens, dropped = dialogue_tokens(byte_tokenizer, messages, sampling_params(max_tokens=10), 150)
    text = byte_tokenizer.decode(tokens)
    assert dropped and len(tokens) <= 140
    assert "S" * 10 in text and "last" in text and "0" * 20 not in text and "5" * 20 in text


def test_a_long_last_message_leaves_little_room_for_the_answer(byte_tokenizer):
    messages = [{"role": "user", "content": "x" * 90}]
    assert len(dialogue_tokens(byte_tokenizer, messages, sampling_params(), 100)[0]) == 93
    assert dialogue_tokens(byte_tokenizer, messages * 3, sampling_params(), 100)[1] == 2


def test_messages_that_the_template_rejects(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    talk = Conversation(EngineSpeaker(engine, sampling_params()))
    with pytest.raises(RequestError, match="template rejects them: roles must alternate"):
        talk.say("Hi", quiet)
    assert talk.turns == []


def test_a_conversation_needs_a_template(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        EngineSpeaker(engine, sampling_params())


def test_ignored_fields_of_the_generation_config_are_reported(endless, monkeypatch):
    model, _ = endless
    monkeypatch.setattr(model, "generation_config", GenerationConfig(num_beams=3, do_sample=True, temperature=0.5))
    with pytest.warns(OptimizerWarning, match="num_beams, which only model.generate supports"):
        assert default_sampling(model, top_k=7).temperature == 0.5
