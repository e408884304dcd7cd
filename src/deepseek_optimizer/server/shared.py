"""What the models of one server have in common: its settings, request bodies, uploaded files, stored responses and batches."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..longdoc.recognized import PageReader
from .batches.store import Batches
from .documents.file_store import FileStore
from .documents.reader import DocumentReader
from .http.json_body import BodyReader
from .settings import ServerSettings
from .stored_responses.store import ResponseStore

_CLIENTS = 4  # a queue accepts this many times the maximum number of jobs of one client
_WORKERS = (2, 4)  # minimum and maximum number of worker processes of one kind


class Shared:
    """
    Args:
        settings: the server's.
        ocr: reads scanned pages of uploaded files; None: they are reported.

    Attributes:
        draining: whether the server is shutting down and refuses requests.
        workers: number of worker processes of one kind.
        max_per_client, max_jobs: limits of each queue; see `FairQueue`.
        forget: called with owner and digest of each uploaded file that is deleted.
    """

    def __init__(self, settings: ServerSettings, ocr: PageReader | None = None) -> None:
        self.settings, self.draining = settings, False
        self.workers = min(max(_WORKERS[0], (os.cpu_count() or 1) // 2), _WORKERS[1])
        self.max_per_client = settings.max_jobs_per_client
        self.max_jobs = _CLIENTS * settings.max_jobs_per_client
        self.bodies = BodyReader(settings, self.max_per_client, self.max_jobs)
        self.forget: list[Callable[[str, str], None]] = []
        self.files = FileStore(settings, self._forget)
        self.reader = DocumentReader(settings, self.workers, self.max_per_client, self.max_jobs, ocr)
        self.responses = ResponseStore(settings, self.max_per_client, self.max_jobs)
        self.batches = Batches(settings)  # after the responses, which check that no other server uses the folder
        self.queues = [self.bodies.queue, *self.reader.queues, self.responses.queue]

    def _forget(self, owner: str, digest: str) -> None:
        for forget in list(self.forget):
            forget(owner, digest)

    def close(self) -> None:
        """Ends the threads and processes."""
        self.bodies.queue.close()
        self.reader.close()
        self.responses.close()
        self.batches.close()
