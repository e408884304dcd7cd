"""A conversation: turns so far, and whoever answers them, a model in this process or a server."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.atomic import atomic_file
from ..engine.request import check_text
from ..errors import RequestError

Messages = list[dict[str, str]]


@dataclass
class Answer:
    """Text and how it came. Times in seconds; `tokens_per_s` counts the tokens after the first (0 where there is no second).

    Attributes:
        ids: of its tokens; none where a server gave it.
        finish_reason: "stop", "length" or "interrupted"; a server may have others.
        prompt_tokens, new_tokens: None where a server does not tell.
        cached_tokens: of the prompt, that did not have to be read again.
        dropped_messages: oldest ones of the dialogue that were left out of the prompt, for it has outgrown the context.
    """

    text: str
    ids: list[int]
    finish_reason: str
    prompt_tokens: int | None
    new_tokens: int | None
    first_token_s: float
    tokens_per_s: float
    cached_tokens: int = 0
    dropped_messages: int = 0

    def summary(self) -> dict[str, Any]:
        """Everything but the ids, for JSON."""
        names = ("text", "finish_reason", "prompt_tokens", "new_tokens", "first_token_s", "tokens_per_s")
        return {name: getattr(self, name) for name in names}


def rate(tokens: int | None, first: float, last: float) -> float:
    """Tokens a second after the first, 0 where that cannot be said."""
    return (tokens - 1) / (last - first) if tokens and tokens > 1 and last > first else 0.0


class StopSignal:
    """Asks an answer to end, from a signal handler or from whatever takes its text."""

    def __init__(self) -> None:
        self.asked = False
        self._then: Callable[[], None] | None = None

    def ask(self) -> None:
        self.asked = True
        if self._then is not None:
            self._then()

    @contextmanager
    def calling(self, then: Callable[[], None]) -> Iterator[None]:
        """Inside, asking calls this; at once where somebody has asked before."""
        if self.asked:
            then()
        self._then = then
        try:
            yield
        finally:
            self._then = None


class Speaker(Protocol):
    """Whoever answers."""

    def answer(self, messages: Messages, write: Callable[[str], None], stop: StopSignal) -> Answer:
        """The answer to a chat, written as it comes. Asked to stop, it ends as "interrupted" with what there is."""


def prompt_tokens(tokenizer: Any, messages: Messages, *, raw: bool = False) -> list[int]:
    """Token ids of a chat, or of the last message's text as it is (`raw`, and models without a template).

    Raises:
        RequestError: a message is no Unicode, or the model's template does not take these messages.
    """
    for message in messages:
        check_text(f"the {message['role']}'s message", message["content"])
    if raw or not tokenizer.chat_template:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise RequestError("messages", f"the model's chat template does not take them: {error}") from error
    return list(encoded["input_ids"])


def prompt_ids(tokenizer: Any, messages: Messages, *, raw: bool = False) -> Any:
    """The same as a tensor for `generate`: int64 [1, T]."""
    import torch

    return torch.tensor([prompt_tokens(tokenizer, messages, raw=raw)], dtype=torch.int64, device="cpu")


@dataclass
class Conversation:
    """Turns so far, and how to take the next one. The system prompt, where there is one, is the first message."""

    speaker: Speaker
    system: str | None = None
    turns: Messages = field(default_factory=list)

    @property
    def messages(self) -> Messages:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def say(self, text: str, write: Callable[[str], None], stop: StopSignal | None = None) -> Answer:
        """The answer to `text`. Both become history, also where the answer was interrupted; an error leaves none."""
        self.turns.append({"role": "user", "content": text})
        try:
            reply = self.speaker.answer(self.messages, write, stop or StopSignal())
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": reply.text})
        return reply

    def reset(self) -> None:
        """Forgets the turns; the system prompt stays."""
        self.turns.clear()

    def undo(self) -> None:
        """Takes back the last question and its answer."""
        del self.turns[-2:]

    def save(self, path: Path) -> None:
        """Writes the messages as JSON, in place of what was there.

        Raises: FileNotFoundError, the folder is not there: a mistyped path makes none.
        """
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        with atomic_file(path) as file:
            file.write((json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n").encode())
