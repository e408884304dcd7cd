"""The history of a conversation, for local and remote models."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.chat.conversation import Answer, Conversation, StopSignal, prompt_ids, prompt_tokens


class Scripted:
    """Returns the given answers in order, and raises those that are exceptions."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def answer(self, messages, write, stop):
        self.asked.append([dict(message) for message in messages])
        reply = self.answers.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        write(reply)
        return Answer(reply, [], "interrupted" if stop.asked else "stop", 1, 1, 0.0, 0.0)


def quiet(_):
    pass


def test_raw_prompts_bypass_the_template(byte_tokenizer):
    message = [{"role": "user", "content": "Hi"}]
    assert byte_tokenizer.decode(prompt_tokens(byte_tokenizer, message)) == "<|user|>Hi<|end|><|assistant|>"
    assert byte_tokenizer.decode(prompt_tokens(byte_tokenizer, message, raw=True)) == "Hi"
    assert prompt_ids(byte_tokenizer, message).tolist() == [prompt_tokens(byte_tokenizer, message)]


def test_history(tmp_path):
    speaker = Scripted("eins", "zwei", "drei")
    talk, pieces = Conversation(speaker, system="Be brief."), []
    talk.say("One", pieces.append)
    talk.say("Two", pieces.append)
    assert pieces == ["eins", "zwei"]
    assert [(m["role"], m["content"]) for m in speaker.asked[1]] == [
        ("system", "Be brief."), ("user", "One"), ("assistant", "eins"), ("user", "Two"),
    ]  # fmt: skip
    talk.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == talk.messages
    talk.undo()
    assert [m["content"] for m in talk.turns] == ["One", "eins"]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("error", [ValueError("too long"), KeyboardInterrupt()])
def test_a_failed_answer_does_not_change_the_history(error):
    talk = Conversation(Scripted("eins", error))
    talk.say("One", quiet)
    before = list(talk.turns)
    with pytest.raises(type(error)):
        talk.say("Two", quiet)
    assert talk.turns == before


def test_an_interrupted_answer_is_kept():
    talk, stop = Conversation(Scripted("ei")), StopSignal()
    stop.ask()
    assert talk.say("One", quiet, stop).finish_reason == "interrupted"
    assert talk.turns[-1] == {"role": "assistant", "content": "ei"}


def test_stopping_calls_the_answering_model():
    stop, called = StopSignal(), []
    with stop.calling(lambda: called.append("first")):
        assert not stop.asked
        stop.ask()
    assert called == ["first"]
    with stop.calling(lambda: called.append("asked before")):
        pass
    stop.ask()
    assert called == ["first", "asked before"]  # nothing is answering any more
