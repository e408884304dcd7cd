"""`LongDocument`: a book, a log, a repository goes in; answers come out, with their places in the text."""

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
from ..integration.generation.saved_prefix import fingerprint, load_prefix, save_prefix
from ..system.progress import show_progress
from .citations import Citation
from .document import Document
from .driver import Driver, TokenUsage
from .engines import Engines
from .material import Limits, Material
from .own_memory import PeakSampler, own_bytes
from .prompts import Prompts
from .read import read_documents
from .split import MAX_LENGTH, STRIDE, Chunk, split
from .stored import restore, store
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
        strategy, reason: which one answered, and why.
        tokens: of all prompts and replies.
        seconds: that it took.
        peak_memory_gb: the most memory, in 10^9 bytes, that this process had of its own while it answered (resident and not
            mapped from a file: `RssAnon`), above what it had before the `LongDocument` was made, when the model was loaded.
            Sampled 50 times a second. None where the system doesn't tell.
        notes: what the reader should know: a reply that was cut, a field that was found nowhere.
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
    """
    Args:
        model: of `load_model`.
        tokenizer: the model's.
        document: a `Document`, a path or several, or a text. A string is a text where it has a line break, else a path.
        max_length, stride: tokens of a chunk at most, and those that it shares with the one before.
        strategy: "auto", "whole", "window", "map_reduce" or "retrieve".
        memory: bytes that all of this may take above the weights; None: as much cache as the model's own may have.
        cache_dir: where what was read of a document that fits is kept between processes; None: nowhere.
        max_tokens: of an answer.
        top: chunks that an answer is retrieved from at most.
        sampling: how tokens are chosen; None: the likeliest. Length and grammar are set here.

    Raises:
        ConfigError: a bad argument, or too little memory.
        DocumentError: a path does not exist, or nothing could be read. Single files that could not are `document.problems`.
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
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("top", top), ("memory", 1 if memory is None else memory)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number, 1 or more, got {value!r}")
        check_name(strategy)
        self._base = own_bytes()
        self.strategy, self._options = strategy, {"max_length": max_length, "stride": stride, "strategy": strategy}
        self.document = _read(document)
        with show_progress("Splitting") as progress:
            chunks = split(self.document, tokenizer, max_length, stride, progress=progress)
        self._engines = Engines(model, tokenizer, memory, self._base, self.document.characters)
        limits = Limits(self._engines.room, self._engines.window, reply=max_tokens, top=top)
        self.material = Material(self.document, chunks, Prompts(tokenizer), limits)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._looked = self._kept = False  # in the cache directory, and whether the cache is there by now
        self._driver = Driver(self._engines.engine, self._engines.grammar, sampling or SamplingParams(temperature=0.0))

    @property
    def chunks(self) -> list[Chunk]:
        """Of all files, in order."""
        return list(self.material.chunks)

    def ask(self, question: str, *, strategy: str | None = None, stop: StopSignal | None = None) -> DocumentAnswer:
        """The answer to a question, from the document.

        Args:
            strategy: in place of the document's own.
            stop: asked, it ends between two steps with a KeyboardInterrupt.

        Raises:
            RequestError: the question is empty, or the strategy cannot answer it; the message names the remedy.
            BackendError: the model could not go on.
        """
        return self._answer(Question(question), strategy, stop)

    def summarize(self, *, strategy: str | None = None, stop: StopSignal | None = None) -> DocumentAnswer:
        """A summary of the whole document; arguments and errors as of `ask`."""
        return self._answer(Summary(), strategy, stop)

    def extract(
        self, schema: Mapping[str, Any], *, strategy: str | None = None, stop: StopSignal | None = None
    ) -> DocumentAnswer:
        """Data of the document by a JSON schema of an object. Where the answer is not valid under it, `notes` say why.

        Arguments and errors as of `ask`.

        Raises:
            RequestError: the schema is wrong or cannot be enforced.
        """
        return self._answer(Extraction(schema), strategy, stop)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes the document, and the blocks of it that are in the cache because it was read whole, to a directory.

        Raises:
            CheckpointError: the directory exists, and `overwrite` is not said.
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
        """What `save` wrote. The next question on it reads nothing again that had been read.

        Args:
            options: of `LongDocument`, in place of those that were saved.

        Raises:
            CheckpointError: a file is missing, cut short or damaged, or the cache is of another model or other settings.
        """
        path = Path(path)
        document, saved = restore(path / _DOCUMENT)
        made = cls(model, tokenizer, document, **{**saved, **options})
        if (path / _BLOCKS).exists():
            made._load(path / _BLOCKS)
        return made

    def close(self) -> None:
        """Gives the cache memory back, and ends the processes that templates and grammars run in."""
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
        """Whether the document is of a length that could be read whole."""
        return 0 < self.material.tokens <= self.material.limits.room

    @property
    def _prefix(self) -> list[int]:
        """The tokens that every prompt with the whole document begins with."""
        before, _ = self.material.prompts.around("")
        return [*before, *self.material.ids]

    def _load(self, path: Path) -> None:
        load_prefix(path, self._engines.runtime, self._engines.arena, self._engines.prefix, self._prefix)

    def _cache_file(self) -> Path | None:
        if self._cache_dir is None or not self._may_be_whole:
            return None
        made_with = repr((self._prefix, sorted(fingerprint(self._engines.runtime).items())))
        return self._cache_dir / f"{hashlib.blake2b(made_with.encode(), digest_size=16).hexdigest()}.blocks"

    def _from_cache_dir(self) -> list[str]:
        """Loads what an earlier process has read, once; what there is to note about it."""
        file = None if self._looked else self._cache_file()
        self._looked = True
        if file is None or not file.exists():
            return []
        try:
            self._load(file)
        except (CheckpointError, CacheFullError, OSError) as error:
            return [f"the saved cache could not be used, and the text was read anew: {error}"]
        self._kept = True
        return []

    def _to_cache_dir(self) -> list[str]:
        """Keeps what was read, once; what there is to note about it."""
        file = self._cache_file()
        if file is None or self._kept:
            return []
        engines = self._engines
        try:
            self._kept = save_prefix(file, engines.runtime, engines.arena, engines.prefix, self._prefix) > 0
        except OSError as error:
            return [f"what was read could not be kept for the next time: {error}"]
        if self._kept:
            return []
        return ["what was read could not be kept: under dynamic RoPE it belongs to one question's length (yarn's does not)"]


def _read(source: Source) -> Document:
    if isinstance(source, Document):
        return source
    if isinstance(source, str) and "\n" in source:
        return Document.of_texts(source)
    with show_progress("Reading files") as progress:
        return read_documents(source, progress=progress)
