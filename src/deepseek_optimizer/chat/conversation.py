"""A conversation: its turns, and the speaker that answers them, a model in this process or a server."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.atomic import atomic_file
from ..engine.request import check_text
from ..errors import RequestError

Messages = list[dict[str, Any]]  # role and content, and `pictures`: paths of files


@dataclass
class Answer:
    """The text of an answer, with token counts and times in seconds.

    Attributes:
        ids: token ids; empty if a server generated it.
        finish_reason: "stop", "length" or "interrupted"; a server may return others.
        prompt_tokens, new_tokens: None if a server does not report them.
        tokens_per_s: speed after the first token; 0 with fewer than two tokens.
        cached_tokens: prompt tokens that were in the prefix cache.
        dropped_messages: number of oldest messages left out of the prompt, because the dialogue exceeds the context.
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
        """The main fields, for JSON."""
        names = ("text", "finish_reason", "prompt_tokens", "new_tokens", "first_token_s", "tokens_per_s")
        return {name: getattr(self, name) for name in names}


def rate(tokens: int | None, first: float, last: float) -> float:
    """Tokens/s after the first token; 0 if undefined."""
    return (tokens - 1) / (last - first) if tokens and tokens > 1 and last > first else 0.0


class StopSignal:
    """Requests that an answer stop, from a signal handler or from the consumer of its text."""

    def __init__(self) -> None:
        self.asked = False
        self._then: Callable[[], None] | None = None

    def ask(self) -> None:
        self.asked = True
        if self._then is not None:
            self._then()

    @contextmanager
    def calling(self, then: Callable[[], None]) -> Iterator[None]:
        """Inside, a request to stop calls `then`; immediately if it was made before."""
        if self.asked:
            then()
        self._then = then
        try:
            yield
        finally:
            self._then = None


class Speaker(Protocol):
    """Answers a chat."""

    def answer(self, messages: Messages, write: Callable[[str], None], stop: StopSignal) -> Answer:
        """The answer to a chat, written as it is generated. On a stop, it ends as "interrupted" with the text so far."""


def prompt_tokens(tokenizer: Any, messages: Messages, *, raw: bool = False) -> list[int]:
    """Token ids of a chat, or of the last message as plain text (`raw`, and models without a chat template).

    Raises:
        RequestError: a message is not valid Unicode, or the model's template rejects these messages.
    """
    for message in messages:
        check_text(f"the {message['role']}'s message", message["content"])
    if raw or not tokenizer.chat_template:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise RequestError("messages", f"the model's chat template rejects them: {error}") from error
    return list(encoded["input_ids"])


def prompt_ids(tokenizer: Any, messages: Messages, *, raw: bool = False) -> Any:
    """Like `prompt_tokens`, as a tensor for `generate`: int64 [1, T]."""
    import torch

    return torch.tensor([prompt_tokens(tokenizer, messages, raw=raw)], dtype=torch.int64, device="cpu")


@dataclass
class Conversation:
    """The turns so far. A system prompt becomes the first message."""

    speaker: Speaker
    system: str | None = None
    turns: Messages = field(default_factory=list)

    @property
    def messages(self) -> Messages:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def say(
        self, text: str, write: Callable[[str], None], stop: StopSignal | None = None, pictures: Sequence[str] = ()
    ) -> Answer:
        """The answer to `text` and to pictures, given by their files. All are added to the history, even if the answer is
        interrupted, but not on an error."""
        self.turns.append({"role": "user", "content": text, **({"pictures": list(pictures)} if pictures else {})})
        try:
            reply = self.speaker.answer(self.messages, write, stop or StopSignal())
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": reply.text})
        return reply

    def reset(self) -> None:
        """Removes all turns; keeps the system prompt."""
        self.turns.clear()

    def undo(self) -> None:
        """Removes the last question and its answer."""
        del self.turns[-2:]

    def save(self, path: Path) -> None:
        """Writes the messages as JSON, replacing an existing file.

        Raises:
            FileNotFoundError: the directory does not exist; it is not created, since the path may be mistyped.
        """
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        with atomic_file(path) as file:
            file.write((json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n").encode())
