"""Access to stored responses from the event loop: the database works on a thread of its own, and clients take turns."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import TypeVar

from ...errors import excerpt
from ..http.caller import Caller
from ..http.fair_queue import FairQueue
from ..http.problems import ApiError
from ..settings import ServerSettings
from .background import BackgroundTasks
from .database import ResponseDatabase, Row

logger = logging.getLogger("deepseek_optimizer.server")
T = TypeVar("T")


class ResponseStore:
    """The stored responses of a server.

    Args:
        settings: the server's.
        max_per_client, max_jobs: see `FairQueue`.

    Raises:
        ConfigError: see `ResponseDatabase`.
    """

    def __init__(self, settings: ServerSettings, max_per_client: int, max_jobs: int) -> None:
        self._database = ResponseDatabase(
            settings.state_dir,
            settings.max_response_bytes_total,
            settings.max_response_bytes_per_client,
            settings.response_seconds,
        )
        self.queue = FairQueue("stored responses", 1, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
        self.background = BackgroundTasks()

    async def put(self, row: Row, caller: Caller) -> None:
        """Stores a response.

        Raises:
            ApiError: 507, it cannot be written; others see `FairQueue.run`.
        """
        await self._run(lambda: self._database.put(row), caller)

    async def update(self, owner: str, id: str, status: str, body: bytes, caller: Caller) -> None:
        """Replaces a response; does nothing if it has been deleted. Raises ApiError as `put` does."""
        await self._run(lambda: self._database.update(owner, id, status, body), caller)

    async def get(self, owner: str, id: str, caller: Caller) -> Row:
        """A stored response.

        Raises:
            ApiError: 404, the owner has none with this id; others see `FairQueue.run`.
        """
        row = await self._run(lambda: self._database.get(owner, id), caller)
        if row is None:
            raise _missing(id)
        return row

    async def conversation(self, owner: str, id: str, caller: Caller) -> list[Row]:
        """The responses of a conversation, from its first to the one with this id.

        Raises:
            ApiError: 400, the owner has none with this id, an earlier one has been deleted, or it is not complete; others see
                `FairQueue.run`.
        """
        field, code = "previous_response_id", "previous_response_not_found"
        rows = await self._run(lambda: self._database.conversation(owner, id), caller)
        if not rows:
            raise ApiError(400, f"{field}: there is no such response, or it is no longer stored", param=field, code=code)
        if rows[0].previous is not None:
            raise ApiError(400, f"{field}: an earlier response of the conversation is no longer stored", param=field, code=code)
        if rows[-1].status in ("queued", "in_progress"):
            raise ApiError(400, f"{field}: this response is not complete yet; wait until its status is completed", param=field)
        return rows

    async def delete(self, owner: str, id: str, caller: Caller) -> None:
        """Deletes a response, and cancels its generation.

        Raises:
            ApiError: 404, the owner has none with this id; others see `FairQueue.run`.
        """
        if not await self._run(lambda: self._database.delete(owner, id), caller):
            raise _missing(id)
        await self.background.cancel(owner, id)

    def sweep(self) -> None:
        """Deletes the responses whose time is over. Blocks."""
        try:
            self._database.sweep()
        except sqlite3.Error as error:
            logger.error("the database of responses failed: %s", error)

    async def finish(self) -> None:
        """Waits until responses in the background are stored, when the engine has stopped."""
        await self.background.join()

    def close(self) -> None:
        """Ends the thread and closes the database."""
        self.queue.close()
        self._database.close()

    async def _run(self, work: Callable[[], T], caller: Caller) -> T:
        try:
            return await self.queue.run(caller.key, work, caller.deadline)
        except sqlite3.Error as error:
            logger.error("the database of responses failed: %s", error)
            raise ApiError(
                507, "the response cannot be stored: the server's state directory cannot be written; send store: false",
                code="storage_failed",
            ) from None  # fmt: skip


def _missing(id: str) -> ApiError:
    return ApiError(404, f"Response with id '{excerpt(id)}' not found.", param="response_id")
