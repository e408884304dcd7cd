"""Loading of data files: records are validated, tokenized once, and cached on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ...checkpoint.atomic import atomic_directory
from ...errors import CheckpointError, ConfigError, DataError
from .encode import EncodedTokens, ExampleEncoder, chunks
from .examples import to_example
from .places import BadLines, Place
from .records import Record, files_of, read_records
from .store import TokenDataset, TokenWriter, open_tokens

TooLong = Literal["error", "truncate", "split", "skip"]
_VERSION = 1  # of the tokenization; increase it when the same data gives other tokens
_MAX_CACHED = 8  # data sets in the cache
_CHUNK = 1024  # default tokens of a chunk of a text file
_REMEDY = "Fix the data, or set skip_bad_lines=True (dso train --skip-bad-lines) to skip such records"


@dataclass(frozen=True)
class DataOptions:
    """How data is split into sequences.

    Args:
        max_length: maximum number of tokens per sequence; None: the model's context length.
        assistant_only: the loss covers only the assistant's messages and the completions of prompts; False: all tokens.
        per_answer: each answer of a chat becomes a sequence of its own, after the prompt that the template renders for it. For
            templates that render a message differently once others follow, or omit its reasoning.
        too_long: what to do with longer sequences: "error", "truncate" (drop the end), "split" (into chunks) or "skip". Text
            files are always split, into chunks of `max_length` (None: 1,024) tokens.
        skip_bad_lines: skip and count invalid records instead of raising an error.

    Raises:
        ConfigError: a value is not allowed.
    """

    max_length: int | None = None
    assistant_only: bool = True
    per_answer: bool = False
    too_long: TooLong = "error"
    skip_bad_lines: bool = False

    def __post_init__(self) -> None:
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 2):
            raise ConfigError(f"max_length must be an integer of 2 or more, or None, got {self.max_length!r}")
        if self.too_long not in ("error", "truncate", "split", "skip"):
            raise ConfigError(f"too_long must be 'error', 'truncate', 'split' or 'skip', got {self.too_long!r}")


@dataclass(frozen=True)
class DataReport:
    """Statistics of loading data.

    Attributes:
        records: number of records, invalid ones included.
        sequences: number of sequences.
        tokens: number of tokens.
        trained_tokens: number of tokens that the loss covers.
        longest: number of tokens of the longest sequence.
        bad: number of invalid records that were skipped.
        bad_shown: error messages of the first of them.
        truncated, split, skipped: number of sequences that were too long, by what was done with them.
        without_answer: number of chunks that were skipped because the loss covers none of their tokens.
    """

    records: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    bad: int = 0
    bad_shown: tuple[str, ...] = ()
    truncated: int = 0
    split: int = 0
    skipped: int = 0
    without_answer: int = 0

    def remarks(self) -> list[str]:
        """Remarks for the user, one line each."""
        counts = [
            (self.bad, "invalid record(s) skipped"),
            (self.truncated, "sequence(s) truncated, since they are too long"),
            (self.split, "sequence(s) split, since they are too long"),
            (self.skipped, "sequence(s) skipped, since they are too long"),
            (self.without_answer, "chunk(s) skipped, since the loss covers none of their tokens"),
        ]
        return [f"{count:,} {what}" for count, what in counts if count] + [f"skipped: {line}" for line in self.bad_shown]


def load_data(
    paths: str | os.PathLike[str] | list[str],
    tokenizer: Any,
    context: int,
    options: DataOptions | None = None,
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TokenDataset, DataReport]:
    """Loads the sequences of files and directories; see `records` and `examples` for the supported formats.

    All records are validated before the first is tokenized. The tokens are cached under a hash of the files, the tokenizer and
    the options, and mapped into memory.

    Args:
        paths: files and directories.
        tokenizer: a Transformers tokenizer.
        context: context length of the model.
        options: None: the defaults of `DataOptions`.
        cache: cache directory; None: `~/.cache/deepseek-optimizer/tokens`.
        progress: called with the number of tokenized records and the number of all records.

    Raises:
        DataError: a file cannot be read or is empty; records are invalid (with their number, and file, line and field of the
            first five); or no record is left.
        ConfigError: max_length exceeds the context; or the chat template does not reveal which tokens the assistant's messages
            are.
    """
    options = options or DataOptions()
    if options.max_length is not None and options.max_length > context:
        raise ConfigError(
            f"max_length={options.max_length:,} is more than the {context:,} tokens of the model's context; set a smaller one"
        )
    given = [os.fspath(paths)] if isinstance(paths, (str, os.PathLike)) else [os.fspath(path) for path in paths]
    files = files_of(given)
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-optimizer" / "tokens"
    target = root / _key(files, tokenizer, context, options)
    if not target.is_dir() or not _usable(target):
        _Tokenization(files, tokenizer, context, options, progress).into(target)
        _remove_old(root, target)
    os.utime(target)
    dataset, report = open_tokens(target)
    return dataset, DataReport(**{**report, "bad_shown": tuple(report["bad_shown"])})


def _key(files: list[Path], tokenizer: Any, context: int, options: DataOptions) -> str:
    key = hashlib.sha256()
    inner = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings = [_VERSION, type(tokenizer).__name__, inner, repr(tokenizer.chat_template), repr(tokenizer.special_tokens_map)]
    key.update(json.dumps([*settings, context, asdict(options)]).encode())
    for file in files:
        try:
            with file.open("rb") as opened:
                digest = (
                    hashlib.file_digest(opened, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(opened)
                )
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", file=file) from error
        key.update(json.dumps([str(file), digest]).encode())
    return key.hexdigest()[:32]


def _digest(opened: Any) -> str:
    digest = hashlib.sha256()
    while block := opened.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _usable(target: Path) -> bool:
    try:
        open_tokens(target)
    except DataError:
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def _remove_old(root: Path, current: Path) -> None:
    """Removes the least recently used data sets from the cache. A process that has one mapped can still use it."""
    others = sorted(
        (d for d in root.iterdir() if d.is_dir() and not d.name.startswith(".") and d != current), key=os.path.getmtime
    )
    for directory in others[: max(0, len(others) - _MAX_CACHED + 1)]:
        shutil.rmtree(directory, ignore_errors=True)


class _Tokenization:
    """Tokenizes the files of a data set."""

    def __init__(
        self,
        files: list[Path],
        tokenizer: Any,
        context: int,
        options: DataOptions,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.files, self.tokenizer, self.options, self.progress = files, tokenizer, options, progress
        self.limit = options.max_length or context
        self.chunk = options.max_length or min(_CHUNK, context)
        self.total = 0  # records
        self.bad = BadLines()
        self.counts = {"records": 0, "truncated": 0, "split": 0, "skipped": 0, "without_answer": 0}
        self.totals = {"sequences": 0, "tokens": 0, "trained_tokens": 0, "longest": 0}

    def into(self, target: Path) -> None:
        """Writes the data set to a directory atomically."""
        self._check()
        try:
            with atomic_directory(target) as directory:
                writer = TokenWriter(directory, [str(file) for file in self.files])
                try:
                    self._write(writer)
                finally:
                    writer.close()
        except CheckpointError:
            if not target.is_dir():  # otherwise another process wrote the same data set
                raise

    def _check(self) -> None:
        """Validates every record first: this takes seconds, whereas tokenization may take many minutes."""
        bad = BadLines()
        for file in self.files:
            for record in read_records(file, bad.add):
                self.total += 1
                try:
                    to_example(record)
                except DataError as error:
                    bad.add(error)
        if not self.options.skip_bad_lines:
            bad.raise_if_any(_REMEDY)

    def _write(self, writer: TokenWriter) -> None:
        encoder = ExampleEncoder(self.tokenizer, self.options.assistant_only, self.options.per_answer)
        try:
            for number, file in enumerate(self.files):
                for record in read_records(file, self._note_bad):
                    self.counts["records"] += 1
                    try:
                        sequences = list(self._sequences(encoder, record))
                    except DataError as error:
                        self.bad.add(error)
                        continue
                    for tokens in sequences:
                        self._add(writer, tokens, record.place, number)
                    if self.progress is not None:
                        self.progress(self.counts["records"], self.total)
        finally:
            encoder.close()
        if not self.options.skip_bad_lines:
            self.bad.raise_if_any(_REMEDY)
        if not self.totals["sequences"]:
            raise DataError(
                "no valid record is left to train on" + "".join(f"\n{line}" for line in self.bad.first), file=self.files[0]
            )
        writer.finish(asdict(DataReport(**self.counts, **self.totals, bad=self.bad.count, bad_shown=tuple(self.bad.first))))

    def _sequences(self, encoder: ExampleEncoder, record: Record) -> Iterator[EncodedTokens]:
        for tokens in encoder.encode(to_example(record), record.place):
            yield from self._fitted(tokens, record.place)

    def _note_bad(self, error: DataError) -> None:
        self.counts["records"] += 1
        self.bad.add(error)

    def _add(self, writer: TokenWriter, tokens: EncodedTokens, place: Place, file: int) -> None:
        trained = sum(tokens.trained[1:])
        if not trained:
            self.counts["without_answer"] += 1
            return
        writer.add(tokens.ids, tokens.trained, place, file)
        self.totals["sequences"] += 1
        self.totals["tokens"] += len(tokens.ids)
        self.totals["trained_tokens"] += trained
        self.totals["longest"] = max(self.totals["longest"], len(tokens.ids))

    def _fitted(self, tokens: EncodedTokens, place: Place) -> list[EncodedTokens]:
        """The sequence, or the parts to use of it, with at most the maximum number of tokens."""
        if tokens.cut:
            return list(chunks(tokens, self.chunk))
        if len(tokens.ids) <= self.limit:
            return [tokens]
        if self.options.too_long == "error":
            limit = f"more than the maximum of {self.limit:,}"
            raise place.error(f"has {len(tokens.ids):,} tokens, {limit}; set too_long (--too-long) to truncate, split or skip")
        if self.options.too_long == "skip":
            self.counts["skipped"] += 1
            return []
        parts = list(chunks(tokens, self.limit))
        if self.options.too_long == "split":
            self.counts["split"] += 1
            return parts
        self.counts["truncated"] += 1
        return parts[:1]
