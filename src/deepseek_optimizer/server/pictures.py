"""Pictures in requests: decoding and encoding on threads, one picture of a client after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..chat.pictures import PictureReader
from .http.caller import Caller
from .http.fair_queue import FairQueue

T = TypeVar("T")


class Pictures:
    """
    Args:
        encoder: a `PictureEncoder` for the engine's model.
        workers: maximum number of processes that decode pictures.
        max_per_client, max_jobs: see `FairQueue`.
    """

    def __init__(self, encoder: Any, workers: int, max_per_client: int, max_jobs: int) -> None:
        self.encoder, self.reader = encoder, PictureReader(workers)
        self.queue = FairQueue("pictures", workers, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)

    async def run(self, caller: Caller, work: Callable[[], T]) -> T:
        """Runs `work` on a thread. ApiError: see `FairQueue.run`."""
        return await self.queue.run(caller.key, work, caller.deadline)

    def close(self) -> None:
        """Ends threads and processes."""
        self.queue.close()
        self.reader.close()
