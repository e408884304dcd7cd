"""Texts to tokens, and chats to prompts, on two threads: one for short texts, which need not wait for the long ones.

Each has a tokenizer of its own, whose settings change while it encodes, and a process of its own for chat templates. Clients
have their turns on each (see `fair_queue`), so that a short chat waits for at most one short text of each other client.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from ...chat.template import ChatTemplate
from ..http.caller import Caller
from ..http.fair_queue import FairQueue

T = TypeVar("T")

SHORT = 16 << 10  # bytes of a request: some 10 ms of work


class Lane:
    """What one thread uses, and no other one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)


class Tokenising:
    """
    Args:
        tokenizer: of Transformers, used by nobody else.
        max_per_client, most: as of `FairQueue`.
    """

    def __init__(self, tokenizer: Any, max_per_client: int, most: int) -> None:
        self.short, self._long = Lane(tokenizer), Lane(copy.deepcopy(tokenizer))
        names = ("tokenising short texts", "tokenising long texts")
        self.queues = [FairQueue(name, 1, max_running=1, max_per_client=max_per_client, most=most) for name in names]

    async def run(self, work: Callable[[Lane], T], caller: Caller, size: int | None = None) -> T:
        """What the work returns, or raises.

        Args:
            size: bytes of its texts, about; None: of the request.

        Raises:
            ApiError: as of `FairQueue.run`.
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
