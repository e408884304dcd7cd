"""Extracts the text of uploaded files in worker processes with limits on time and memory. The files of one client are read one
at a time, so that the other processes are free for other clients. Scanned pages are read by an OCR model, if there is one, in
this process: one picture at a time, of all clients in turn."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...chat.pictures import rgb_image
from ...errors import DocumentError, RequestError
from ...longdoc.document import Page, TextBox, TextFile
from ...longdoc.recognized import PageReader, RecognizedLine, lines_of_pictures
from ...system.sandbox.pool import WorkerPool
from ...system.sandbox.worker import WorkerError
from ..http.caller import Caller
from ..http.fair_queue import FairQueue
from ..http.problems import ApiError
from ..settings import ServerSettings

_JOB = Path(__file__).with_name("job.py")
_MEMORY = 1 << 30  # maximum bytes of memory for reading a file
_NICE = 5  # niceness of the processes: generating answers has priority
_MAX_PIXELS = 1 << 23  # of the pictures of a page for the OCR model: A4 at about 300 dpi


class DocumentReader:
    """Reads files in worker processes, which are started when they are needed.

    Args:
        settings: the server's.
        workers: maximum number of processes, and so of files that are read at the same time.
        max_per_client, max_jobs: see `FairQueue`.
        ocr: reads scanned pages; None: they are reported.
    """

    def __init__(
        self, settings: ServerSettings, workers: int, max_per_client: int, max_jobs: int, ocr: PageReader | None = None
    ) -> None:
        setup = {
            "package": __name__.partition(".")[0], "max_characters": settings.max_file_bytes, "max_pixels": _MAX_PIXELS,
        }  # fmt: skip
        self.workers = WorkerPool(_JOB, setup, workers, seconds=settings.file_read_seconds, memory=_MEMORY, nice=_NICE)
        # One thread per process, so that a waiting file is in memory once, and not also as a message to a worker.
        self.queue = FairQueue("files", workers, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
        self._pages = FairQueue("scanned pages", 1, max_running=1, max_per_client=max_per_client, max_jobs=max_jobs)
        self.queues = [self.queue] if ocr is None else [self.queue, self._pages]
        self._ocr, self._max_pages = ocr, settings.max_scanned_pages

    async def read(self, name: str, data: bytes | bytearray, caller: Caller) -> TextFile:
        """Extracts the text of a file.

        Args:
            name: the file's; its extension tells the format.
            data: the file's content.
            caller: who sent the request.

        Raises:
            DocumentError: the file cannot be read, or reading takes too much time or memory.
            WorkerLostError: the process that read it was killed by something else, twice.
            BackendError: the OCR model failed.
            ApiError: 501, a library is not installed; others: see `FairQueue.run`.
        """
        file = {"name": name, "data": data}
        result = await self._work(file | {"ocr": None if self._ocr is None else {"pages": {}}}, caller)
        truncated: list[int] = []
        if self._ocr is not None and "scanned" in result:
            pages = await self._recognize(self._ocr, file, result["scanned"], truncated, caller)
            result = await self._work(file | {"ocr": {"pages": pages}}, caller)
        if "problem" in result:
            raise DocumentError(name, result["problem"])
        warnings = list(result["warnings"])
        if truncated:
            listed = ", ".join(map(str, truncated))
            warnings.append(f"pages with more text than the OCR model writes, which is cut off: {listed}")
        pages_of_text = tuple(Page(*page) for page in result["pages"])
        boxes = tuple(TextBox(start, end, tuple(box)) for start, end, box in result["boxes"])
        return TextFile(name, result["text"], pages_of_text, tuple(result["headings"]), tuple(warnings), boxes)

    async def _recognize(
        self, ocr: PageReader, file: dict[str, Any], numbers: list[int], truncated: list[int], caller: Caller
    ) -> dict[str, Any]:
        """The lines or the problem of each page without text, as `job.py` expects them; adds to `truncated` the numbers of
        pages whose text was cut off."""
        if len(numbers) > self._max_pages:
            raise DocumentError(
                file["name"],
                f"has {len(numbers):,} pages without text, of which at most {self._max_pages:,} are read by the OCR model; "
                "send a part of it",
            )
        pages: dict[str, Any] = {}
        for number in numbers:
            try:
                found = await self._work(file | {"page": number}, caller)
            except DocumentError as error:  # of its worker; other pages may be readable
                found = {"problem": error.message}
            if "pictures" not in found:
                pages[str(number)] = found
                continue
            try:
                parts = [await self._read_picture(ocr, picture, caller) for picture in found["pictures"]]
            except RequestError as error:
                pages[str(number)] = {"problem": str(error)}
            else:
                pages[str(number)] = {"lines": lines_of_pictures([lines for lines, _ in parts])}
                truncated += [number] if any(cut for _, cut in parts) else []
        return pages

    async def _read_picture(
        self, ocr: PageReader, picture: tuple[int, int, str], caller: Caller
    ) -> tuple[Sequence[RecognizedLine], bool]:
        """The lines of a picture, and whether its text was cut off. Other clients have their turns between the pictures of a
        page, of which there may be many; and none is read for a client that is gone, or after the deadline."""

        def read() -> tuple[Sequence[RecognizedLine], bool]:  # decodes too, which would delay the event loop
            width, height, pixels = picture
            image = rgb_image(width, height, base64.b64decode(pixels))
            before = getattr(ocr, "truncated", 0)  # an `OcrModel` counts the pages that it cut off
            return ocr.read(image), getattr(ocr, "truncated", 0) > before

        return await self._pages.run(caller.key, read, caller.deadline)

    async def _work(self, payload: dict[str, Any], caller: Caller) -> Any:
        """The result of a worker; raises as `read` does."""

        def work() -> Any:
            return self.workers.call({**payload, "data": base64.b64encode(payload["data"]).decode()})

        try:
            result = await self.queue.run(caller.key, work, caller.deadline)
        except WorkerError as error:
            raise DocumentError(payload["name"], f"cannot be read: {error}") from None
        if "missing" in result:
            raise ApiError(501, result["missing"], param="file", code="missing_package")
        return result

    def close(self) -> None:
        """Ends threads and processes."""
        for queue in (self.queue, self._pages):
            queue.close()
        self.workers.close()
