"""`LongDocument`: answers questions about a book, a log or a repository, with citations."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..chat.conversation import StopSignal
from ..checkpoint.atomic import atomic_directory
from ..engine.request import SamplingParams
from ..errors import CacheFullError, CheckpointError, ConfigError
from ..integration.generation.fingerprint import fingerprint
from ..integration.generation.saved_prefix import load_prefix, save_prefix
from ..system.progress import show_progress
from .citations import Citation
from .document import Document
from .driver import Driver, TokenUsage
from .engines import Engines
from .material import Limits, Material
from .own_memory import PeakSampler, own_bytes
from .prompts import Prompts
from .read import read_documents
from .recognized import PageReader
from .saved_document import restore, store
from .split import MAX_LENGTH, STRIDE, Chunk, split
from .strategies import answer_by, check_name
from .tasks import Extraction, Question, Summary, Task

_DOCUMENT, _BLOCKS = "document.json", "blocks.bin"
Source = Document | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True)
class DocumentAnswer:
    """
    Attributes:
        answer: text, or for an extraction a JSON value.
        citations: passages of the document that support it, the best first.
        strategy, reason: the strategy used, and why.
        tokens: of all prompts and replies.
        seconds: total time.
        peak_memory_gb: peak memory of this process while answering, in 10^9 bytes, above that before the `LongDocument` was
            constructed with the model loaded. Counts resident memory that is not mapped from a file (`RssAnon`), sampled 50
            times a second. None where the system is not Linux.
        notes: for the user: for example, a truncated reply, or a field that was not found.
    """

    answer: Any
    citations: list[Citation]
    strategy: str
    reason: str
    tokens: TokenUsage
    seconds: float
    peak_memory_gb: float | None
    notes: list[str] = field(default_factory=list)


class LongDocument:
    """Answers questions about documents that may be longer than the model's context.

    Args:
        model: from `load_model`.
        tokenizer: the model's.
        document: a `Document`, one or several paths, or a text. A string that contains a line break is a text; any other is a
            path.
        max_length: maximum length of a chunk, in tokens.
        stride: overlap of consecutive chunks, in tokens.
        strategy: "auto", "whole", "window", "map_reduce" or "retrieve".
        memory: maximum memory used besides the weights, in bytes; None: the cache may be as large as the model's own.
        cache_dir: directory in which to save the KV cache of documents that fit the context, for later processes; None: it is
            not saved.
        max_tokens: maximum length of an answer, in tokens.
        top: with "retrieve", maximum number of chunks from which to answer.
        sampling: sampling parameters; None: greedy. Maximum length and grammar are overridden.
        ocr: reads scanned pages of PDFs, and pictures, if `document` is a path, such as `OcrModel`; None: they are reported.

    Raises:
        ConfigError: an invalid argument, or too little memory.
        DocumentError: a path does not exist, or no file could be read. Individual unreadable files are in `document.problems`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        document: Source,
        *,
        max_length: int = MAX_LENGTH,
        stride: int = STRIDE,
        strategy: str = "auto",
        memory: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        max_tokens: int = 512,
        top: int = 4,
        sampling: SamplingParams | None = None,
        ocr: PageReader | None = None,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("top", top), ("memory", 1 if memory is None else memory)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number, 1 or more, got {value!r}")
        check_name(strategy)
        self._base = own_bytes()
        self.strategy, self._options = strategy, {"max_length": max_length, "stride": stride, "strategy": strategy}
        self.document = _read(document, ocr)
        with show_progress("Splitting") as progress:
            chunks = split(self.document, tokenizer, max_length, stride, progress=progress)
        self._engines = Engines(model, tokenizer, memory, self._base, self.document.characters)
        limits = Limits(self._engines.room, self._engines.window, reply=max_tokens, top=top)
        self.material = Material(self.document, chunks, Prompts(tokenizer), limits)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._looked_up = self._saved = False  # whether cache_dir was searched, and whether it has this document
        self._driver = Driver(self._engines.engine, self._engines.grammar, sampling or SamplingParams(temperature=0.0))

    @property
    def chunks(self) -> list[Chunk]:
        """The chunks of all files, in order."""
        return list(self.material.chunks)

    def ask(self, question: str, *, strategy: str | None = None, stop: StopSignal | None = None) -> DocumentAnswer:
        """Answers a question from the document.

        Args:
            strategy: overrides that of the constructor.
            stop: a signal that stops the work: KeyboardInterrupt is raised between two steps.

        Raises:
            RequestError: the question is empty, or the strategy cannot answer it; the message names the remedy.
            BackendError: the model failed.
        """
        return self._answer(Question(question), strategy, stop)

    def summarize(self, *, strategy: str | None = None, stop: StopSignal | None = None) -> DocumentAnswer:
        """Summarizes the whole document; arguments and errors as in `ask`."""
        return self._answer(Summary(), strategy, stop)

    def extract(
        self, schema: Mapping[str, Any], *, strategy: str | None = None, stop: StopSignal | None = None
    ) -> DocumentAnswer:
        """Extracts data that matches a JSON schema of an object. If the answer violates the schema, `notes` says how.

        Arguments and errors as in `ask`.

        Raises:
            RequestError: the schema is invalid or cannot be enforced.
        """
        return self._answer(Extraction(schema), strategy, stop)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Saves the document, and its KV cache if it fits the context, to a directory.

        Raises:
            CheckpointError: the directory exists, and `overwrite` is False.
            OSError: it cannot be written.
        """
        path = Path(path)
        with atomic_directory(path, overwrite) as folder:
            store(folder / _DOCUMENT, self.document, self._options)
            if self._may_be_whole:
                save_prefix(folder / _BLOCKS, self._engines.runtime, self._engines.arena, self._engines.prefix, self._prefix)
        return path

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: Any, tokenizer: Any, **options: Any) -> LongDocument:
        """Loads a document that `save` wrote. The next question reuses the saved KV cache.

        Args:
            options: arguments of `LongDocument`, which override the saved ones.

        Raises:
            CheckpointError: a file is missing, truncated or damaged, or the cache belongs to another model or other settings.
        """
        path = Path(path)
        document, saved = restore(path / _DOCUMENT)
        loaded = cls(model, tokenizer, document, **{**saved, **options})
        if (path / _BLOCKS).exists():
            loaded._load(path / _BLOCKS)
        return loaded

    def close(self) -> None:
        """Releases the cache memory, and ends the worker processes for templates and grammars."""
        self._engines.close()
        self.material.prompts.close()

    def __enter__(self) -> LongDocument:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- inside

    def _answer(self, task: Task, strategy: str | None, stop: StopSignal | None) -> DocumentAnswer:
        started = time.perf_counter()
        with PeakSampler() as peak:
            notes = self._from_cache_dir()
            work = answer_by(task, self.material, strategy or self.strategy)
            with show_progress("Reading") as progress:
                result, tokens = self._driver.run(work, progress, stop)
            if result.strategy == "whole":
                notes += self._to_cache_dir()
        above = None if peak.bytes is None or self._base is None else max(0, peak.bytes - self._base) / 1e9
        seconds = time.perf_counter() - started
        notes += result.notes
        return DocumentAnswer(result.answer, result.citations, result.strategy, result.reason, tokens, seconds, above, notes)

    @property
    def _may_be_whole(self) -> bool:
        """Whether the document may be short enough to be read whole."""
        return 0 < self.material.tokens <= self.material.limits.room

    @property
    def _prefix(self) -> list[int]:
        """The tokens that every prompt with the whole document starts with."""
        before, _ = self.material.prompts.around("")
        return [*before, *self.material.ids]

    def _load(self, path: Path) -> None:
        load_prefix(path, self._engines.runtime, self._engines.arena, self._engines.prefix, self._prefix)

    def _cache_file(self) -> Path | None:
        if self._cache_dir is None or not self._may_be_whole:
            return None
        key = repr((self._prefix, sorted(fingerprint(self._engines.runtime).items())))
        return self._cache_dir / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.blocks"

    def _from_cache_dir(self) -> list[str]:
        """Loads the KV cache that an earlier process saved, once. Returns notes."""
        file = None if self._looked_up else self._cache_file()
        self._looked_up = True
        if file is None or not file.exists():
            return []
        try:
            self._load(file)
        except (CheckpointError, CacheFullError, OSError) as error:
            return [f"the saved cache could not be used, so the text was read again: {error}"]
        self._saved = True
        return []

    def _to_cache_dir(self) -> list[str]:
        """Saves the KV cache of the document, once. Returns notes."""
        file = self._cache_file()
        if file is None or self._saved:
            return []
        engines = self._engines
        try:
            self._saved = save_prefix(file, engines.runtime, engines.arena, engines.prefix, self._prefix) > 0
        except OSError as error:
            return [f"the cache could not be saved for later questions: {error}"]
        if self._saved:
            return []
        return [
            "the cache could not be saved: with dynamic RoPE scaling it depends on the length of the question (with yarn "
            "it does not)"
        ]


def _read(source: Source, ocr: PageReader | None) -> Document:
    if isinstance(source, Document):
        return source
    if isinstance(source, str) and "\n" in source:
        return Document.of_texts(source)
    with show_progress("Reading files") as progress:
        return read_documents(source, progress=progress, ocr=ocr)
