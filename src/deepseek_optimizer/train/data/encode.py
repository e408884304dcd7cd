"""Tokenization of examples, with a mask of the tokens that are trained."""

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

_BLOCK = 1 << 20  # characters to tokenize at once


class EncodedTokens(NamedTuple):
    """A tokenized sequence.

    Attributes:
        ids: the tokens.
        trained: for each token, whether the loss covers it.
        cut: whether the sequence may be split anywhere.
    """

    ids: list[int]
    trained: list[bool]
    cut: bool


class ExampleEncoder:
    """Tokenizes examples with a tokenizer and its chat template.

    Args:
        tokenizer: a Transformers tokenizer.
        assistant_only: the loss covers only the assistant's messages and the completions of prompts; False: all tokens.
        per_answer: each answer of a chat becomes a sequence of its own, after the prompt that the template renders for it.

    Raises:
        MissingPackageError: jinja2 is needed and not installed.
    """

    def __init__(self, tokenizer: Any, assistant_only: bool, per_answer: bool) -> None:
        self._tokenizer, self._assistant_only, self._per_answer = tokenizer, assistant_only, per_answer
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        if self._template is not None and importlib.util.find_spec("jinja2") is None:
            raise MissingPackageError("a chat template", "jinja2", "train")

    def close(self) -> None:
        """Stops the process in which templates run."""
        if self._template is not None:
            self._template.close()

    def encode(self, example: Example, place: Place) -> Iterator[EncodedTokens]:
        """Yields the sequences of an example.

        Args:
            place: location of the record, for errors.

        Raises:
            DataError: the template rejects the example, or it has nothing to train on.
            ConfigError: the template does not reveal which tokens the assistant's messages are.
        """
        if isinstance(example, PlainText):
            ids = self._text(example.text)
            yield EncodedTokens(ids, [True] * len(ids), example.cut)
        elif isinstance(example, PromptAndAnswer) and self._template is None:
            yield self._completion(example)
        else:
            yield from self._chat(example.chat() if isinstance(example, PromptAndAnswer) else example, place)

    def _text(self, text: str) -> list[int]:
        """The tokens of a text with the tokenizer's special tokens; an end-of-text token is always the last."""
        ids: list[int] = self._tokenizer(next(blocks := _blocks(text)), verbose=False)["input_ids"]
        for block in blocks:
            ids += self._tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if ids and ids[-1] == self._tokenizer.eos_token_id else ids + self._end()

    def _completion(self, example: PromptAndAnswer) -> EncodedTokens:
        prompt = self._tokenizer(example.plain, verbose=False)["input_ids"]
        if prompt and prompt[-1] == self._tokenizer.eos_token_id:  # added by some tokenizers
            prompt = prompt[:-1]
        answer = self._tokenizer(example.completion, add_special_tokens=False, verbose=False)["input_ids"] + self._end()
        trained = [not self._assistant_only] * len(prompt) + [True] * len(answer)
        return EncodedTokens(prompt + answer, trained, cut=False)

    def _end(self) -> list[int]:
        return [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]

    def _chat(self, chat: Chat, place: Place) -> Iterator[EncodedTokens]:
        if self._template is None:
            raise ConfigError(
                f"{place} is a chat, but the tokenizer has no chat template; use a model whose tokenizer has one (an -Instruct "
                "or -Chat model), or set tokenizer.chat_template"
            )
        try:
            if self._assistant_only and self._per_answer:
                answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
                for i in answers:
                    yield self._one_answer(Chat(chat.messages[: i + 1], chat.tools), place)
                if not answers:
                    raise place.error("has no assistant message, so there is nothing to train on")
            else:
                yield self._whole_chat(chat, place)
        except RequestError as error:
            raise place.error(str(error).removeprefix("messages: ")) from None

    def _whole_chat(self, chat: Chat, place: Place) -> EncodedTokens:
        assert self._template is not None
        if self._assistant_only and chat.messages[0]["role"] == "assistant" and not self._template.marks_answers():
            raise place.error(
                "begins with an assistant message, which answers nothing; put a user message first", "messages[0]"
            )
        dialogue = self._template.dialogue(chat.messages, tools=chat.tools)
        if self._assistant_only and dialogue.answers is None:
            raise ConfigError(
                f"{place}: this model's chat template renders a message differently once others follow, so the assistant's "
                "tokens cannot be located; set per_answer=True (each answer becomes a sequence), set assistant_only=False, or "
                "add {% generation %} marks to the template"
            )
        if dialogue.hidden:
            raise self._omitted(chat, dialogue.hidden[0], place)
        if not self._assistant_only:
            return EncodedTokens(dialogue.ids, [True] * len(dialogue.ids), cut=False)
        trained = [False] * len(dialogue.ids)
        for begin, end in dialogue.answers or ():
            trained[begin:end] = [True] * (end - begin)
        if not any(trained):
            raise place.error("has no assistant message, so there is nothing to train on")
        return EncodedTokens(dialogue.ids, trained, cut=False)

    def _one_answer(self, chat: Chat, place: Place) -> EncodedTokens:
        """A chat whose last message is the answer to train on."""
        assert self._template is not None
        last = len(chat.messages) - 1
        if last == 0:
            raise place.error(
                "begins with an assistant message, which answers nothing; put a user message first", "messages[0]"
            )
        dialogue = self._template.dialogue(chat.messages, tools=chat.tools)
        if dialogue.answers and last not in dialogue.hidden:
            begin, end = dialogue.answers[-1]
            return EncodedTokens(dialogue.ids[:end], [False] * begin + [True] * (end - begin), cut=False)
        return self._as_written(chat, last, place)

    def _as_written(self, chat: Chat, last: int, place: Place) -> EncodedTokens:
        """The prompt, and the answer with its reasoning as the model generates it, for templates that omit reasoning."""
        assert self._template is not None
        message = chat.messages[last]
        reasoning, answer = _split_reasoning(message)
        if message.get("tool_calls") or reasoning is None:
            raise self._omitted(chat, last, place)
        prompt = self._template.render(chat.messages[:last], tools=chat.tools)
        opened = [] if opened_by(prompt.text) else self._layout(f"{OPEN}\n")
        ids = [
            *opened,
            *self._template.said(reasoning),
            *self._layout(f"\n{CLOSE}\n\n"),
            *self._template.said(answer),
            *self._end(),
        ]
        return EncodedTokens(prompt.ids + ids, [False] * len(prompt.ids) + [True] * len(ids), cut=False)

    def _layout(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _omitted(self, chat: Chat, index: int, place: Place) -> DataError:
        reasoning = chat.messages[index]["role"] == "assistant" and _split_reasoning(chat.messages[index])[0] is not None
        remedy = "set per_answer=True, which trains reasoning as the model generates it, or remove it from the data"
        what = f"the model's chat template omits reasoning; {remedy}"
        part = "the model's chat template omits part of this message; remove that part"
        return place.error(what if reasoning else part, f"messages[{index}]")


def _split_reasoning(message: dict[str, Any]) -> tuple[str | None, str]:
    """(reasoning, answer) of an assistant message, from `reasoning_content` or from tags in the content."""
    content: str = message["content"]
    if message.get("reasoning_content"):
        return message["reasoning_content"].strip("\n"), content
    before, closed, answer = content.partition(CLOSE)
    if not closed:
        return None, content
    return before.lstrip().removeprefix(OPEN).strip("\n"), answer.lstrip("\n")


def _blocks(text: str) -> Iterator[str]:
    """Splits a text into blocks of whole lines, since a tokenizer needs many times the size of a text in memory."""
    begin = 0
    while len(text) - begin > _BLOCK:
        end = text.rfind("\n", begin, begin + _BLOCK) + 1
        if end <= begin:
            end = begin + _BLOCK
        yield text[begin:end]
        begin = end
    yield text[begin:]


def chunks(tokens: EncodedTokens, length: int) -> Iterator[EncodedTokens]:
    """Splits a sequence into chunks of at most `length` tokens."""
    for begin in itertools.count(0, length):
        if begin >= len(tokens.ids):
            return
        part = slice(begin, begin + length)
        yield EncodedTokens(tokens.ids[part], tokens.trained[part], tokens.cut)
