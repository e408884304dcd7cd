"""Bytes that a client sent to their text: in a process of its own, with limits on time and memory, one file after the other."""

from __future__ import annotations

import asyncio
import base64
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..engine.worker import Worker, WorkerError
from ..errors import DocumentError
from ..longdoc.document import Page, TextFile
from .problems import ApiError
from .settings import ServerSettings

_JOB = Path(__file__).with_name("document_job.py")
_MEMORY = 1 << 30  # bytes that reading one file may take


class DocumentReader:
    """Starts its process with the first file."""

    def __init__(self, settings: ServerSettings) -> None:
        setup = {"package": __name__.partition(".")[0], "most": settings.most_file_bytes}
        self._worker = Worker(_JOB, setup, seconds=settings.file_read_seconds, memory=_MEMORY)
        # One thread: while it works, what others sent waits as the bytes that they are, and not as messages to the worker too.
        self._thread = ThreadPoolExecutor(1, "dso-files")

    async def read(self, name: str, data: bytes | bytearray, deadline: float) -> TextFile:
        """
        Args:
            deadline: of `time.monotonic`.

        Raises:
            DocumentError: it can't be read, or takes too long or too much memory to be.
            ApiError: 501, a library is not installed; 503, it could not be read in time, since so many are before it.
        """
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._read, name, data)
        try:
            found = await asyncio.wait_for(future, max(0.01, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(
                503, "file: others' files took all the time", code="unavailable", headers={"Retry-After": "30"}
            ) from None
        except WorkerError as error:
            raise DocumentError(name, f"cannot be read: {error}") from None
        if "missing" in found:
            raise ApiError(501, found["missing"], param="file", code="missing_package")
        if "problem" in found:
            raise DocumentError(name, found["problem"])
        pages = tuple(Page(*page) for page in found["pages"])
        return TextFile(name, found["text"], pages, tuple(found["headings"]), tuple(found["warnings"]))

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, name: str, data: bytes | bytearray) -> Any:
        return self._worker.call({"name": name, "data": base64.b64encode(data).decode()})
