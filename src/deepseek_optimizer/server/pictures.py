"""Pictures in requests: fetching, decoding and encoding on threads, one request of a client after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..chat.pictures import MAX_BYTES, PictureReader, data_of
from ..engine.pictures import PictureRows
from ..errors import RequestError
from .http.caller import Caller
from .http.fair_queue import FairQueue
from .remote_pictures import RemotePictures, is_remote

T = TypeVar("T")
MAX_TOTAL_BYTES = 32 << 20  # of the pictures of a request


class Pictures:
    """
    Args:
        encoder: a `PictureEncoder` for the engine's model.
        workers: maximum number of processes that decode pictures.
        max_per_client, max_jobs: see `FairQueue`.
        domains: see `RemotePictures`.
        seconds: the same.
    """

    def __init__(
        self, encoder: Any, workers: int, max_per_client: int, max_jobs: int, domains: Sequence[str], seconds: float
    ) -> None:
        self.encoder, self.reader = encoder, PictureReader(workers)
        self.remote = RemotePictures(domains, seconds, MAX_BYTES)
        self._decoding = FairQueue("pictures", workers, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
        # Apart from the above, since a job mostly waits for other servers.
        self._fetching = FairQueue("remote pictures", 16, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
        self.queues = [self._decoding, self._fetching]

    async def prompt(
        self, caller: Caller, ids: Sequence[int], urls: Sequence[tuple[str, str]], salt: str
    ) -> tuple[list[int], PictureRows | None]:
        """A prompt with its pictures, see `PictureEncoder.prompt`.

        Args:
            caller: who sent the request.
            ids: the prompt's token ids, with a placeholder for each picture.
            urls: of each picture the field of the request, and its URL.
            salt: of the caches for this request.

        Raises:
            RequestError: a picture cannot be fetched or decoded, or there are too many bytes.
            WorkerLostError, EngineBusyError: see `PictureReader.read`.
            ApiError: see `FairQueue.run`.
        """
        queue = self._fetching if any(is_remote(url) for _, url in urls) else self._decoding
        data = await self._run(queue, caller, lambda: self._contents(urls))
        return await self._run(self._decoding, caller, lambda: self.encoder.prompt(ids, self.reader.read(data), salt))

    def _contents(self, urls: Sequence[tuple[str, str]]) -> list[tuple[str, bytes]]:
        data: list[tuple[str, bytes]] = []
        for field, url in urls:
            data.append((field, self.remote.read(url, field) if is_remote(url) else data_of(url, field)))
            if sum(len(content) for _, content in data) > MAX_TOTAL_BYTES:
                raise RequestError(
                    field, f"is too large: the pictures of a request may have {MAX_TOTAL_BYTES >> 20} MiB in total"
                )
        return data

    async def _run(self, queue: FairQueue, caller: Caller, work: Callable[[], T]) -> T:
        return await queue.run(caller.key, work, caller.deadline)

    def close(self) -> None:
        """Ends threads and processes."""
        for queue in self.queues:
            queue.close()
        self.reader.close()
