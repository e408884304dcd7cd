"""The header of a GGUF file, checked completely before anything else is read.

Layout, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, tensor count, key count;
keys with typed values; for each tensor a name, dimensions (innermost first), a type and an offset; then the aligned data.
Counts and lengths are compared with the number of remaining bytes before they are used. Arrays are skipped, and decoded only
on request: a vocabulary has 150,000 strings, of which loading the weights needs only the number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..quant.ggml import GGML_TYPES, GgmlType
from .files import DataFile

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_NAME, _MAX_KEY, _MAX_DIMS = 63, 65535, 4  # GGML_MAX_NAME, 64, includes the terminating zero
_MIN_KEY_BYTES, _MIN_TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
_MAX_ALIGNMENT = 1 << 20
_CHUNK = 1 << 16

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. `shape`: outermost dimension first, as in torch; `offset`: bytes from the start of the file."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufArray:
    """An array value that has not been read. `length`: number of elements; `offset`: of the first one in the file."""

    type: int
    length: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Keys and tensors of a file. Arrays are not read: see `read_array`."""

    version: int
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads a file sequentially in chunks, never beyond its end."""

    def __init__(self, file: DataFile, at: int = 0) -> None:
        self.file = file
        self.at = at
        self._start, self._data = at, b""

    @property
    def left(self) -> int:
        return self.file.size - self.at

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{what[:300]} (at byte {self.at})", file=self.file.path)

    def take(self, count: int) -> bytes:
        begin = self.at - self._start
        end = begin + count
        if end > len(self._data):
            if count > self.left:
                raise self.wrong(f"the header needs {count} more bytes, but {self.left} remain: it is damaged or truncated")
            self._data = self.file.read(self.at, min(max(count, _CHUNK), self.left))
            self._start, begin, end = self.at, 0, count
        self.at += count
        return self._data[begin:end]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str, min_bytes: int) -> int:
        """Reads a count of items that take at least `min_bytes` bytes each."""
        n: int = self.number("Q")
        if n > self.left // min_bytes:
            raise self.wrong(f"claims {n} {what}, more than the remaining {self.left} bytes can hold")
        return n

    def text(self, what: str, limit: int) -> str:
        length = self.number("Q")
        if not 0 < length <= limit:
            raise self.wrong(f"the {what} is {length} bytes long, not 1 to {limit}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"the {what} is not UTF-8") from error

    def string(self) -> str:
        try:
            return self.take(self.count("bytes of text", 1)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong("a string is not UTF-8") from error

    def skip(self, count: int) -> None:
        if count > self.left:
            raise self.wrong(f"the header needs {count} more bytes, but {self.left} remain: it is damaged or truncated")
        self.at += count

    def skip_strings(self, n: int) -> None:
        """Skips `n` strings, using the chunk in memory: this takes most of the time of reading a header."""
        read = struct.Struct("<Q").unpack_from
        while n:
            if self.left < 8:
                raise self.wrong(f"an array of strings extends {n} strings past the end of the file")
            if not 0 <= self.at - self._start <= len(self._data) - 8:
                self._start, self._data = self.at, self.file.read(self.at, min(_CHUNK, self.left))
            data, at, last = self._data, self.at - self._start, len(self._data) - 8
            while n and at <= last:
                at += 8 + read(data, at)[0]
                n -= 1
            if self._start + at > self.file.size:
                raise self.wrong("a string in an array extends past the end of the file")
            self.at = self._start + at


def read_header(file: DataFile) -> GgufHeader:
    """Reads and checks the header; CheckpointError says what is wrong with it."""
    cursor = _Cursor(file)
    if file.size < 24 or cursor.take(4) != _MAGIC:
        raise CheckpointError("is not a GGUF file: it does not begin with 'GGUF' and a header", file=file.path)
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = "big-endian files are not supported" if swapped in _VERSIONS else f"versions {_VERSIONS} are supported"
        raise CheckpointError(f"is GGUF version {version}; {why}", file=file.path)
    n_tensors = cursor.count("tensors", _MIN_TENSOR_BYTES)
    n_keys = cursor.count("keys", _MIN_KEY_BYTES)
    values: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.text("key", _MAX_KEY)
        if key in values:
            raise cursor.wrong(f"duplicate key {key!r}")
        values[key] = _value(cursor, cursor.number("I"), key)
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.wrong(f"general.alignment is {alignment!r}, not a power of two up to {_MAX_ALIGNMENT}")
    entries = _entries(cursor, n_tensors)
    data = -(-cursor.at // alignment) * alignment
    return GgufHeader(version, values, {t.name: t for t in _place(file, entries, data, alignment)})


def read_array(file: DataFile, array: GgufArray) -> list[Any]:
    """The elements of an array value."""
    cursor = _Cursor(file, array.offset)
    if array.type == _STRING:
        return [cursor.string() for _ in range(array.length)]
    code = _SCALARS[array.type]
    data = cursor.take(array.length * struct.calcsize("<" + code))
    return [v for (v,) in struct.iter_unpack("<" + code, data)]


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        if kind == _BOOL:
            byte = cursor.number("B")
            if byte > 1:
                raise cursor.wrong(f"{key} is a boolean with the value {byte}, not 0 or 1")
            return bool(byte)
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise cursor.wrong(f"{key} has the unknown type {kind}")
    element = cursor.number("I")
    if element != _STRING and element not in _SCALARS:
        raise cursor.wrong(f"{key} is an array of the unknown type {element}")
    size = 8 if element == _STRING else struct.calcsize("<" + _SCALARS[element])
    array = GgufArray(element, cursor.count(f"elements of {key}", size), cursor.at)
    if element == _STRING:
        cursor.skip_strings(array.length)
    else:
        cursor.skip(array.length * size)
    return array


def _entries(cursor: _Cursor, count: int) -> list[tuple[str, GgmlType, tuple[int, ...], int]]:
    entries, names = [], set()
    for _ in range(count):
        name = cursor.text("name of a tensor", _MAX_NAME)
        if name in names:
            raise cursor.wrong(f"duplicate tensor {name!r}")
        names.add(name)
        n_dims = cursor.number("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise cursor.wrong(f"tensor {name!r} has {n_dims} dimensions, not 1 to {_MAX_DIMS}")
        dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims))
        code, offset = struct.unpack("<IQ", cursor.take(12))
        if code not in GGML_TYPES:
            raise cursor.wrong(f"tensor {name!r} has the unknown type {code}")
        if not GGML_TYPES[code].fits(dims[0]):
            raise cursor.wrong(f"tensor {name!r} has rows of {dims[0]} elements, not whole blocks of {GGML_TYPES[code].name}")
        entries.append((name, GGML_TYPES[code], dims[::-1], offset))
    return entries


def _place(
    file: DataFile, entries: list[tuple[str, GgmlType, tuple[int, ...], int]], data: int, alignment: int
) -> Iterator[GgufTensor]:
    """Yields the tensors in file order, and checks that they are aligned, within the file and do not overlap."""

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(what, file=file.path, tensor=name)

    end = data
    for name, kind, shape, offset in sorted(entries, key=lambda e: e[3]):
        rows = 1
        for size in shape[:-1]:
            rows *= size
        nbytes = rows * kind.row_bytes(shape[-1])
        if nbytes == 0:
            raise wrong(f"has no elements: shape {shape}")
        if offset % alignment:
            raise wrong(f"is at offset {offset}, which is not a multiple of {alignment}")
        if data + offset < end:
            raise wrong("overlaps the tensor before it")
        end = data + offset + nbytes
        if end > file.size:
            raise wrong(f"ends at byte {end}, but the file has {file.size}: it is truncated; download it again")
        yield GgufTensor(name, kind, shape, data + offset, nbytes)
