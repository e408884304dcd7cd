"""Extracts the text of uploaded files in worker processes with limits on time and memory. The files of one client are read one
at a time, so that the other processes are free for other clients."""

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
_MEMORY = 1 << 30  # maximum bytes of memory for reading a file
_NICE = 5  # niceness of the processes: generating answers has priority


class DocumentReader:
    """Reads files in worker processes, which are started when they are needed.

    Args:
        settings: the server's.
        workers: maximum number of processes, and so of files that are read at the same time.
        max_per_client, max_jobs: see `FairQueue`.
    """

    def __init__(self, settings: ServerSettings, workers: int, max_per_client: int, max_jobs: int) -> None:
        setup = {"package": __name__.partition(".")[0], "max_characters": settings.max_file_bytes}
        self.workers = WorkerPool(_JOB, setup, workers, seconds=settings.file_read_seconds, memory=_MEMORY, nice=_NICE)
        # One thread per process, so that a waiting file is in memory once, and not also as a message to a worker.
        self.queue = FairQueue("files", workers, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)

    async def read(self, name: str, data: bytes | bytearray, caller: Caller) -> TextFile:
        """Extracts the text of a file.

        Args:
            name: the file's; its extension tells the format.
            data: the file's content.
            caller: who sent the request.

        Raises:
            DocumentError: the file cannot be read, or reading takes too much time or memory.
            WorkerLostError: the process that read it was killed by something else, twice.
            ApiError: 501, a library is not installed; others: see `FairQueue.run`.
        """
        try:
            result = await self.queue.run(caller.key, lambda: self._read(name, data), caller.deadline)
        except WorkerError as error:
            raise DocumentError(name, f"cannot be read: {error}") from None
        if "missing" in result:
            raise ApiError(501, result["missing"], param="file", code="missing_package")
        if "problem" in result:
            raise DocumentError(name, result["problem"])
        pages = tuple(Page(*page) for page in result["pages"])
        return TextFile(name, result["text"], pages, tuple(result["headings"]), tuple(result["warnings"]))

    def close(self) -> None:
        """Ends threads and processes."""
        self.queue.close()
        self.workers.close()

    def _read(self, name: str, data: bytes | bytearray) -> Any:
        return self.workers.call({"name": name, "data": base64.b64encode(data).decode()})
