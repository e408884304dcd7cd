"""Reading of training data files, record by record, each with its location.

`.jsonl` files have one JSON object per line, `.json` files an array of objects; any other file is a text and one record.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...errors import DataError
from .places import Place

LINES, ARRAYS = (".jsonl", ".ndjson"), (".json",)
MAX_BYTES = 64 << 20  # per line
MAX_TEXT = 1 << 30  # bytes of a file other than JSON lines
_MARK = b"\xef\xbb\xbf"  # UTF-8 byte order mark, as written by editors on Windows
_LEFT_OUT = frozenset(("node_modules", "__pycache__", "CVS"))


class Record(NamedTuple):
    """A location, and a value: a JSON object, or the text of a file."""

    place: Place
    value: Any


def files_of(paths: list[str]) -> list[Path]:
    """The files at paths, and all files below directories, sorted by name, except hidden ones.

    Raises:
        DataError: a path does not exist or is not a regular file, or a directory has no files.
    """
    result: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            raise DataError("does not exist", file=given)
        files = list(_under(path)) if path.is_dir() else [path]
        if not files:
            raise DataError("has no files", file=given)
        for file in files:
            if not file.is_file():  # files are read twice, which pipes do not support
                raise DataError("is not a regular file", file=file)
            result.setdefault(file)
    return list(result)


def _under(directory: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _LEFT_OUT)
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def read_records(file: Path, bad: Callable[[DataError], None]) -> Iterator[Record]:
    """Yields the records of a file. JSON lines are read line by line, other files as a whole.

    Args:
        bad: called with the error of each invalid record, which is skipped.

    Raises:
        DataError: the file as a whole cannot be read, or is empty.
    """
    try:
        with file.open("rb") as opened:
            if file.suffix.lower() in LINES:
                yield from _lines(file, opened, bad)
            else:
                yield from _whole(file, opened, bad)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=file) from error


def _lines(file: Path, opened: BinaryIO, bad: Callable[[DataError], None]) -> Iterator[Record]:
    number, empty = 0, True
    while line := opened.readline(MAX_BYTES + 1):
        number += 1
        place = Place(str(file), number)
        if len(line) > MAX_BYTES:
            while line and not line.endswith(b"\n"):
                line = opened.readline(MAX_BYTES)
            empty = False
            bad(place.error(f"has more than {MAX_BYTES >> 20} MB, the maximum of a record"))
            continue
        if number == 1:
            line = line.removeprefix(_MARK)
        if not line.strip():
            continue
        empty = False
        try:
            yield Record(place, _json(line, place))
        except DataError as error:
            bad(error)
    if empty:
        raise DataError("is empty", file=file)


def _whole(file: Path, opened: BinaryIO, bad: Callable[[DataError], None]) -> Iterator[Record]:
    data = opened.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise DataError(f"has more than {MAX_TEXT >> 30} GB; split it into several files, or use JSON lines", file=file)
    place = Place(str(file), None)
    if not data.removeprefix(_MARK).strip():
        raise DataError("is empty", file=file)
    if file.suffix.lower() not in ARRAYS:
        yield Record(place, _text(data, place))
        return
    array = _json(data, place)
    if not isinstance(array, list):
        raise place.error("must be an array of records; for one record per line, name the file .jsonl")
    if not array:
        raise place.error("is an empty array")
    for number, value in enumerate(array, 1):
        inner = Place(str(file), number)
        if isinstance(value, dict):
            yield Record(inner, value)
        else:
            bad(inner.error(f"a record must be a JSON object, got {type(value).__name__}"))


def _json(data: bytes, place: Place) -> Any:
    try:
        value = json.loads(_text(data, place), parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise place.error("is nested too deeply") from None
    except json.JSONDecodeError as error:
        at = f"character {error.pos + 1}" if place.line is not None else f"line {error.lineno}, character {error.colno}"
        raise place.error(f"is not valid JSON: {error.msg.removesuffix(' at')} at {at}") from None
    except ValueError as error:  # from the two functions below, or for an integer with thousands of digits
        raise place.error(f"is not valid JSON: {error}") from None
    if place.line is not None and not isinstance(value, dict):
        raise place.error(f"a line must be a JSON object, got {type(value).__name__}")
    return value


def _text(data: bytes, place: Place) -> str:
    if b"\0" in data:
        raise place.error("is not text: it contains NUL characters")
    try:
        return data.decode("utf-8-sig" if place.line is None else "utf-8")
    except UnicodeDecodeError as error:
        raise place.error(f"is not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02X}; convert it to UTF-8") from None


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large")
    return value
