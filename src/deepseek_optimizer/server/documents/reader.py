"""Bytes that a client sent to their text: in processes of their own, with limits on time and memory. A client's files are read
one after the other, which leaves a process to the others."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ...errors import DocumentError
from ...longdoc.document import Page, TextFile
from ...system.sandbox.pool import WorkerPool
from ...system.sandbox.worker import WorkerError
from ..http.caller import Caller
from ..http.fair_queue import FairQueue
from ..http.problems import ApiError
from ..settings import ServerSettings

_JOB = Path(__file__).with_name("job.py")
_MEMORY = 1 << 30  # bytes that reading one file may take


_NICE = 5  # of the processes: answers that are being written go first


class DocumentReader:
    """Starts its processes when there are files for them.

    Args:
        workers: processes, and files that are read at once.
        max_per_client, most: as of `FairQueue`.
    """

    def __init__(self, settings: ServerSettings, workers: int, max_per_client: int, most: int) -> None:
        setup = {"package": __name__.partition(".")[0], "most": settings.max_file_bytes}
        self.workers = WorkerPool(_JOB, setup, workers, seconds=settings.file_read_seconds, memory=_MEMORY, nice=_NICE)
        # As many threads: what waits does so as the bytes that it is, and not as a message to a worker too.
        self.queue = FairQueue("files", workers, max_running=1, max_per_client=max_per_client, most=most)

    async def read(self, name: str, data: bytes | bytearray, caller: Caller) -> TextFile:
        """
        Raises:
            DocumentError: it can't be read, or takes too long or too much memory to be.
            WorkerLostError: something else ended the process that read it, twice.
            ApiError: 501, a library is not installed; others as of `FairQueue.run`.
        """
        try:
            found = await self.queue.run(caller.key, lambda: self._read(name, data), caller.deadline)
        except WorkerError as error:
            raise DocumentError(name, f"cannot be read: {error}") from None
        if "missing" in found:
            raise ApiError(501, found["missing"], param="file", code="missing_package")
        if "problem" in found:
            raise DocumentError(name, found["problem"])
        pages = tuple(Page(*page) for page in found["pages"])
        return TextFile(name, found["text"], pages, tuple(found["headings"]), tuple(found["warnings"]))

    def close(self) -> None:
        """Ends threads and processes."""
        self.queue.close()
        self.workers.close()

    def _read(self, name: str, data: bytes | bytearray) -> Any:
        return self.workers.call({"name": name, "data": base64.b64encode(data).decode()})
