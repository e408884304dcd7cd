"""Examples to tokens, each with whether it is trained on."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...chat.reasoning import CLOSE, OPEN, opened_by
from ...chat.template import ChatTemplate
from ...errors import ConfigError, DataError, MissingPackageError, RequestError
from .examples import Chat, Example, PlainText, PromptAndAnswer
from .places import Place

_BLOCK = 1 << 20  # characters that are tokenised at once


class EncodedTokens(NamedTuple):
    """A sequence: ids, and for each whether the model is trained to say it. cut: it may be cut anywhere."""

    ids: list[int]
    trained: list[bool]
    cut: bool


class ExampleEncoder:
    """
    Args:
        tokenizer: of Transformers; with its chat template chats are rendered.
        assistant_only: the loss is that of what the assistant says, and of what completes a prompt; False: of all tokens.
        per_answer: every answer of a chat becomes a sequence of its own, behind the prompt that the template makes for it.
    """

    def __init__(self, tokenizer: Any, assistant_only: bool, per_answer: bool) -> None:
        self._tokenizer, self._assistant_only, self._per_answer = tokenizer, assistant_only, per_answer
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        if self._template is not None and importlib.util.find_spec("jinja2") is None:
            raise MissingPackageError("a chat template", "jinja2", "train")

    def close(self) -> None:
        """Ends the process that templates run in."""
        if self._template is not None:
            self._template.close()

    def encode(self, example: Example, place: Place) -> Iterator[EncodedTokens]:
        """
        Raises:
            DataError: the template refuses it, or there is nothing in it to train on.
            ConfigError: the template does not tell where the assistant speaks.
        """
        if isinstance(example, PlainText):
            ids = self._text(example.text)
            yield EncodedTokens(ids, [True] * len(ids), example.cut)
        elif isinstance(example, PromptAndAnswer) and self._template is None:
            yield self._completion(example)
        else:
            yield from self._chat(example.chat() if isinstance(example, PromptAndAnswer) else example, place)

    def _text(self, text: str) -> list[int]:
        """With what the tokenizer begins and ends texts with, and the end of text behind it."""
        ids: list[int] = self._tokenizer(next(blocks := _blocks(text)), verbose=False)["input_ids"]
        for block in blocks:
            ids += self._tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if ids and ids[-1] == self._tokenizer.eos_token_id else ids + self._end()

    def _completion(self, example: PromptAndAnswer) -> EncodedTokens:
        prompt = self._tokenizer(example.plain, verbose=False)["input_ids"]
        if prompt and prompt[-1] == self._tokenizer.eos_token_id:  # some tokenizers end every text
            prompt = prompt[:-1]
        answer = self._tokenizer(example.completion, add_special_tokens=False, verbose=False)["input_ids"] + self._end()
        trained = [not self._assistant_only] * len(prompt) + [True] * len(answer)
        return EncodedTokens(prompt + answer, trained, cut=False)

    def _end(self) -> list[int]:
        return [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]

    def _chat(self, chat: Chat, place: Place) -> Iterator[EncodedTokens]:
        if self._template is None:
            raise ConfigError(
                f"{place} is a chat, but the tokenizer has no chat template to make it a text; take a model whose tokenizer "
                "has one (an -Instruct or -Chat model), or set tokenizer.chat_template"
            )
        try:
            if self._assistant_only and self._per_answer:
                answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
                for i in answers:
                    yield self._one_answer(Chat(chat.messages[: i + 1], chat.tools), place)
                if not answers:
                    raise place.error("has no message of the assistant, so there is nothing to train on")
            else:
                yield self._whole(chat, place)
        except RequestError as error:
            raise place.error(str(error).removeprefix("messages: ")) from None

    def _whole(self, chat: Chat, place: Place) -> EncodedTokens:
        assert self._template is not None
        if self._assistant_only and chat.messages[0]["role"] == "assistant" and not self._template.marks_answers():
            raise place.error(
                "begins with the assistant, which has nothing to answer; put a user's message first", "messages[0]"
            )
        made = self._template.dialogue(chat.messages, tools=chat.tools)
        if self._assistant_only and made.answers is None:
            raise ConfigError(
                f"{place}: this model's chat template makes no prompts that a chat goes on from (it shows a message otherwise "
                "once others follow), so where the assistant speaks can't be told. Set per_answer=True (each answer an example "
                "of its own), or assistant_only=False, or put {% generation %} marks into the template"
            )
        if made.hidden:
            raise self._hidden(chat, made.hidden[0], place)
        if not self._assistant_only:
            return EncodedTokens(made.ids, [True] * len(made.ids), cut=False)
        trained = [False] * len(made.ids)
        for begin, end in made.answers or ():
            trained[begin:end] = [True] * (end - begin)
        if not any(trained):
            raise place.error("has no message of the assistant, so there is nothing to train on")
        return EncodedTokens(made.ids, trained, cut=False)

    def _one_answer(self, chat: Chat, place: Place) -> EncodedTokens:
        """A chat that ends with the answer to train on."""
        assert self._template is not None
        last = len(chat.messages) - 1
        if last == 0:
            raise place.error(
                "begins with the assistant, which has nothing to answer; put a user's message first", "messages[0]"
            )
        made = self._template.dialogue(chat.messages, tools=chat.tools)
        if made.answers and last not in made.hidden:
            begin, end = made.answers[-1]
            return EncodedTokens(made.ids[:end], [False] * begin + [True] * (end - begin), cut=False)
        return self._as_written(chat, last, place)

    def _as_written(self, chat: Chat, last: int, place: Place) -> EncodedTokens:
        """The prompt, and an answer with thoughts as a model writes it, where the template leaves thoughts out."""
        assert self._template is not None
        message = chat.messages[last]
        thoughts, answer = _thoughts_of(message)
        if message.get("tool_calls") or thoughts is None:
            raise self._hidden(chat, last, place)
        prompt = self._template.render(chat.messages[:last], tools=chat.tools)
        opened = [] if opened_by(prompt.text) else self._layout(f"{OPEN}\n")
        ids = [
            *opened,
            *self._template.said(thoughts),
            *self._layout(f"\n{CLOSE}\n\n"),
            *self._template.said(answer),
            *self._end(),
        ]
        return EncodedTokens(prompt.ids + ids, [False] * len(prompt.ids) + [True] * len(ids), cut=False)

    def _layout(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _hidden(self, chat: Chat, index: int, place: Place) -> DataError:
        thoughts = chat.messages[index]["role"] == "assistant" and _thoughts_of(chat.messages[index])[0] is not None
        remedy = "set per_answer=True, which trains thoughts as the model writes them, or leave them out of the data"
        what = f"thoughts are left out by the model's chat template; {remedy}"
        return place.error(what if thoughts else "the model's chat template does not show all of it", f"messages[{index}]")


def _thoughts_of(message: dict[str, Any]) -> tuple[str | None, str]:
    """(thoughts, what is said) of an assistant's message, whichever way it has them."""
    content: str = message["content"]
    if message.get("reasoning_content"):
        return message["reasoning_content"].strip("\n"), content
    before, closed, answer = content.partition(CLOSE)
    if not closed:
        return None, content
    return before.lstrip().removeprefix(OPEN).strip("\n"), answer.lstrip("\n")


def _blocks(text: str) -> Iterator[str]:
    """A text in blocks of whole lines: a tokenizer takes a large text in one go at many times its size in memory."""
    begin = 0
    while len(text) - begin > _BLOCK:
        end = text.rfind("\n", begin, begin + _BLOCK) + 1
        if end <= begin:
            end = begin + _BLOCK
        yield text[begin:end]
        begin = end
    yield text[begin:]


def pieces(tokens: EncodedTokens, length: int) -> Iterator[EncodedTokens]:
    """A sequence in pieces of so many tokens at most."""
    for begin in itertools.count(0, length):
        if begin >= len(tokens.ids):
            return
        part = slice(begin, begin + length)
        yield EncodedTokens(tokens.ids[part], tokens.trained[part], tokens.cut)
