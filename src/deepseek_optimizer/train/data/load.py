"""Files to sequences of tokens: checked line by line, made into tokens once, kept on the disk."""

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
from .encode import EncodedTokens, ExampleEncoder, pieces
from .examples import to_example
from .places import BadLines, Place
from .records import Record, files_of, read_records
from .store import TokenDataset, TokenWriter, open_tokens

TooLong = Literal["error", "truncate", "split", "skip"]
_VERSION = 1  # of what tokens are made by; raise it where the same data would give others
_KEPT = 8  # data sets in the cache
_PIECE = 1024  # tokens of a piece of text where nothing is said
_REMEDY = "Mend the data, or set skip_bad_lines=True (dso train --skip-bad-lines) to leave such records out"


@dataclass(frozen=True)
class DataOptions:
    """How data becomes sequences.

    Args:
        max_length: tokens of a sequence, at most; None: what the model has positions for.
        assistant_only: the loss is that of what the assistant says, and of what completes a prompt; False: of all tokens.
        per_answer: every answer of a chat becomes a sequence of its own, behind the prompt that the template makes for it: for
            templates that show a message otherwise once others follow, and for thoughts that they leave out.
        too_long: what becomes of a longer sequence: "error", "truncate" (its end is cut off), "split" (into pieces), "skip".
            Text files are always split, into pieces of `max_length` (None: 1,024) tokens.
        skip_bad_lines: records that cannot be used are left out and counted, instead of an error.

    Raises:
        ConfigError: a value that is none of these.
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
    """What became of the records.

    Attributes:
        records: read, bad ones included.
        sequences, tokens: made of them. trained_tokens: those that the loss is of. longest: tokens of the longest sequence.
        bad: records left out. bad_shown: the first of them.
        truncated, split, skipped: longer than they may be, and what became of them.
        without_answer: pieces left out because nothing in them is trained on.
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
        """What a user should know of it, a line each."""
        said = [
            (self.bad, "record(s) cannot be used and are left out"),
            (self.truncated, "sequence(s) were too long and are truncated"),
            (self.split, "sequence(s) were too long and are split"),
            (self.skipped, "sequence(s) were too long and are left out"),
            (self.without_answer, "piece(s) without anything to train on are left out"),
        ]
        return [f"{count:,} {what}" for count, what in said if count] + [f"left out: {line}" for line in self.bad_shown]


def load_data(
    paths: str | os.PathLike[str] | list[str],
    tokenizer: Any,
    context: int,
    options: DataOptions | None = None,
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TokenDataset, DataReport]:
    """Sequences of files and directories (see `records` and `examples` for what these may hold).

    All records are checked before the first is made into tokens. The tokens are kept in `cache` under a name made of the files'
    contents, the tokenizer and the options, and mapped from there.

    Args:
        tokenizer: of Transformers.
        context: tokens that the model has positions for.
        cache: None: `~/.cache/deepseek-optimizer/tokens`.
        progress: called with how many records are made into tokens, and how many there are.

    Raises:
        DataError: a file cannot be read or is empty; records cannot be used (the count, and the first five with file, line and
            field); nothing is left.
        ConfigError: max_length is beyond the context; the chat template does not tell where the assistant speaks.
    """
    options = options or DataOptions()
    if options.max_length is not None and options.max_length > context:
        raise ConfigError(
            f"max_length={options.max_length:,} is more than the {context:,} tokens that the model has positions for"
        )
    given = [os.fspath(paths)] if isinstance(paths, (str, os.PathLike)) else [os.fspath(path) for path in paths]
    files = files_of(given)
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-optimizer" / "tokens"
    target = root / _key(files, tokenizer, context, options)
    if not target.is_dir() or not _usable(target):
        _Making(files, tokenizer, context, options, progress).into(target)
        _forget_old(root, target)
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


def _forget_old(root: Path, kept: Path) -> None:
    """Data sets beyond the latest few; a process that has one mapped keeps it."""
    others = sorted(
        (d for d in root.iterdir() if d.is_dir() and not d.name.startswith(".") and d != kept), key=os.path.getmtime
    )
    for directory in others[: max(0, len(others) - _KEPT + 1)]:
        shutil.rmtree(directory, ignore_errors=True)


class _Making:
    """One run over the files."""

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
        self.piece = options.max_length or min(_PIECE, context)
        self.total = 0  # records
        self.bad = BadLines()
        self.counts = {"records": 0, "truncated": 0, "split": 0, "skipped": 0, "without_answer": 0}
        self.made = {"sequences": 0, "tokens": 0, "trained_tokens": 0, "longest": 0}

    def into(self, target: Path) -> None:
        """Makes the directory; it is there whole, or not at all."""
        self._check()
        try:
            with atomic_directory(target) as directory:
                writer = TokenWriter(directory, [str(file) for file in self.files])
                try:
                    self._write(writer)
                finally:
                    writer.close()
        except CheckpointError:
            if not target.is_dir():  # where it is, another process made the same meanwhile
                raise

    def _check(self) -> None:
        """Every record's form, before the first is made into tokens: that takes seconds, tokens may take many minutes."""
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
        if not self.made["sequences"]:
            raise DataError(
                "no record is left to train on" + "".join(f"\n{line}" for line in self.bad.first), file=self.files[0]
            )
        writer.finish(asdict(DataReport(**self.counts, **self.made, bad=self.bad.count, bad_shown=tuple(self.bad.first))))

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
        self.made["sequences"] += 1
        self.made["tokens"] += len(tokens.ids)
        self.made["trained_tokens"] += trained
        self.made["longest"] = max(self.made["longest"], len(tokens.ids))

    def _fitted(self, tokens: EncodedTokens, place: Place) -> list[EncodedTokens]:
        """A sequence as one, or as several, of at most so many tokens."""
        if tokens.cut:
            return list(pieces(tokens, self.piece))
        if len(tokens.ids) <= self.limit:
            return [tokens]
        if self.options.too_long == "error":
            most = f"more than the {self.limit:,} that a sequence may have"
            raise place.error(f"has {len(tokens.ids):,} tokens, {most}; too_long (--too-long) can be truncate, split or skip")
        if self.options.too_long == "skip":
            self.counts["skipped"] += 1
            return []
        parts = list(pieces(tokens, self.limit))
        if self.options.too_long == "split":
            self.counts["split"] += 1
            return parts
        self.counts["truncated"] += 1
        return parts[:1]
