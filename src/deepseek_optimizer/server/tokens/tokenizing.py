"""Tokenizing texts and rendering chats on two threads, so that short texts do not wait for long ones.

Each thread has its own tokenizer, since encoding changes a tokenizer's settings, and its own process for chat templates.
Clients take turns on each (see `fair_queue`), so that a short chat waits for at most one short text of each other client.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

from ...chat.control_tokens import ControlTokens, Marks
from ...chat.template import ChatTemplate
from ..http.caller import Caller
from ..http.fair_queue import FairQueue

T = TypeVar("T")

SHORT = 16 << 10  # bytes of a request that takes about 10 ms of work


class Lane:
    """The tokenizer and chat template of one thread."""

    def __init__(self, tokenizer: Any, pictures: bool = False) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, pictures=pictures)

    @cached_property
    def _controls(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, "")

    def plain(self, text: str) -> list[int]:
        """Token ids of a text inside a prompt, none of them a control token.

        Raises:
            RequestError: it contains characters that the tokenizer itself turns into a control token.
        """
        marks = Marks()
        return self._controls.encode(self._controls.mark(text, marks), marks, first=False).ids if text else []


class Tokenizing:
    """The two threads, with their queues.

    Args:
        tokenizer: of Transformers; nothing else may use it.
        max_per_client, max_jobs: see `FairQueue`.
        pictures: whether messages may have places of pictures.
    """

    def __init__(self, tokenizer: Any, max_per_client: int, max_jobs: int, pictures: bool = False) -> None:
        self.short, self._long = Lane(tokenizer, pictures), Lane(copy.deepcopy(tokenizer), pictures)
        names = ("tokenizing short texts", "tokenizing long texts")
        self.queues = [FairQueue(name, 1, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs) for name in names]

    async def run(self, work: Callable[[Lane], T], caller: Caller, size: int | None = None) -> T:
        """Runs `work` on a thread; returns its result, or raises its exception.

        Args:
            work: called with the thread's tokenizer and template.
            caller: who sent the request.
            size: approximate bytes of the texts; None: those of the request.

        Raises:
            ApiError: see `FairQueue.run`.
        """
        short = (caller.size if size is None else size) <= SHORT
        lane, queue = (self.short, self.queues[0]) if short else (self._long, self.queues[1])
        return await queue.run(caller.key, lambda: work(lane), caller.deadline)

    def close(self) -> None:
        """Ends threads and processes."""
        for queue in self.queues:
            queue.close()
        for lane in (self.short, self._long):
            lane.template.close()
