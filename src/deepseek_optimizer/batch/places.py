"""How many answers of batches are computed at once: a request takes as many places as it has answers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from .requests import RESPONSES


class Places:
    """Places that requests take, first come, first served: a large request is not overtaken by small ones for ever.

    Args:
        count: the number of places.
    """

    def __init__(self, count: int) -> None:
        self.count = self._free = count
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, wanted: int) -> AsyncIterator[None]:
        """Waits until `wanted` places are free, at most all of them, and takes them for the context."""
        wanted = min(wanted, self.count)
        await self._take(wanted)
        try:
            yield
        finally:
            self._give(wanted)

    async def _take(self, wanted: int) -> None:
        if not self._waiting and wanted <= self._free:
            self._free -= wanted
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if (wanted, turn) in self._waiting:
                self._waiting.remove((wanted, turn))
            self._give(0 if turn.cancelled() else wanted)  # it may have had its turn at the same time
            raise

    def _give(self, count: int) -> None:
        self._free += count
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= wanted
                turn.set_result(None)


def answers_of(url: str, body: dict[str, Any]) -> int:
    """Number of sequences that a request computes at the same time: its answers to each of its prompts, or its texts. A field
    without a valid value counts as absent; the endpoint refuses the request.

    Args:
        url, body: see `BatchRequest`.
    """
    if url == RESPONSES:
        return 1
    texts = body.get("input" if url == "/v1/embeddings" else "prompt")
    several = isinstance(texts, list) and bool(texts) and not isinstance(texts[0], int)  # integers: the tokens of one text
    answers = max([1, *(value for name in ("n", "best_of") if type(value := body.get(name)) is int)])
    return (len(texts) if several and texts is not None else 1) * answers
