"""Invalid GGUF headers of every kind."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
import torch

from deepseek_optimizer.checkpoint.files import DataFile
from deepseek_optimizer.checkpoint.gguf_header import GgufArray, GgufHeader, read_array, read_header
from deepseek_optimizer.errors import CheckpointError
from support.checkpoint_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I64,
    STRING,
    U8,
    U32,
    U64,
    gguf_bytes,
    gguf_string,
    gguf_tensor,
    gguf_value,
    model_tensors,
    model_values,
)  # fmt: skip


def opened(tmp_path: Path, data: bytes) -> GgufHeader:
    (tmp_path / "x.gguf").write_bytes(data)
    return read_header(DataFile(tmp_path / "x.gguf"))


def refused(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as caught:
        opened(tmp_path, data)
    assert caught.value.file == str(tmp_path / "x.gguf")


def head(version: int = 3, tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


ONE = [gguf_tensor("w", torch.ones(2, 32))]


def test_values_and_arrays(tmp_path: Path) -> None:
    values = {
        "a": (U8, 200), "b": (I8, -3), "c": (F32, 0.5), "d": (BOOL, 1), "e": (STRING, "höh"), "f": (U64, 2**63), "g": (I64, -5),
        "h": (F64, 0.1), "i": (ARRAY, (STRING, ["x", "", "yy"])), "j": (ARRAY, (I8, [-1, 2])), "k": (ARRAY, (U32, [])),
    }  # fmt: skip
    header = opened(tmp_path, gguf_bytes(values, ONE))
    file = DataFile(tmp_path / "x.gguf")
    for key, (kind, value) in values.items():
        actual = header.values[key]
        if kind == ARRAY:
            assert isinstance(actual, GgufArray) and actual.length == len(value[1])
            assert read_array(file, actual) == value[1]
        else:
            assert actual == value and (kind != BOOL or actual is True)
    assert header.tensors["w"].shape == (2, 32) and header.tensors["w"].type.name == "F32"


def test_against_ggufs_own_writer_and_reader(tmp_path: Path) -> None:
    path = tmp_path / "lib.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("x.y", 7)
    writer.add_array("tokens", [f"token {i}" for i in range(30_000)])  # more than a chunk
    writer.add_tensor("t1", torch.ones(3, 64).numpy())
    writer.add_tensor("t2", torch.ones(5).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = DataFile(path)
    ours, theirs = read_header(file), gguf.GGUFReader(path)
    assert ours.values["x.y"] == 7 and read_array(file, ours.values["tokens"])[29_999] == "token 29999"
    assert {(t.name, int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors} == {
        (t.name, t.offset, t.nbytes) for t in ours.tensors.values()
    }


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignments(tmp_path: Path, alignment: int) -> None:
    data = gguf_bytes({"general.alignment": (U32, alignment)}, [*ONE, gguf_tensor("v", torch.ones(3))], alignment=alignment)
    tensors = opened(tmp_path, data).tensors
    assert tensors["v"].offset + 12 == len(data) and tensors["w"].offset % alignment == 0


def test_every_truncation(tmp_path: Path) -> None:
    whole = gguf_bytes(model_values(), model_tensors())
    path = tmp_path / "x.gguf"
    for size in (*range(0, 1500, 7), *range(1500, len(whole), 1009), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_header(DataFile(path))


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (head(magic=b"GGML"), "not a GGUF file"),
        (head(version=0), "version 0"),
        (head(version=1), "version 1"),
        (head(version=4), "version 4"),
        (head(version=2**32 - 1), "version"),
        (head(version=3 << 24), "big-endian"),
        (head(tensors=2**64 - 1), "claims .* tensors"),
        (head(keys=2**64 - 1), "claims .* keys"),
        (head(keys=1), "claims 1 keys"),
        (head(tensors=1000) + b"\0" * 100, "claims 1000 tensors"),
    ],
)
def test_bad_beginnings(tmp_path: Path, data: bytes, why: str) -> None:
    refused(tmp_path, data, why)


@pytest.mark.parametrize(
    "body, why",
    [
        (struct.pack("<q", -1), "key is 18446744073709551615 bytes long"),
        (gguf_string(""), "key is 0 bytes long"),
        (gguf_string("k" * 65536), "key is 65536 bytes long"),
        (gguf_string(b"\xff\xfe") + gguf_value(U8, 1), "key is not UTF-8"),
        (gguf_string("k") + struct.pack("<I", 13), "unknown type 13"),
        (gguf_string("k") + struct.pack("<I", 2**31), "unknown type"),
        (gguf_string("k") + struct.pack("<IB", BOOL, 2), "boolean with the value 2"),
        (gguf_string("k") + struct.pack("<Iq", STRING, -1), "claims"),
        (gguf_string("k") + struct.pack("<IQ", STRING, 10**6), "claims 1000000 bytes"),
        (gguf_string("k") + struct.pack("<I", STRING) + gguf_string(b"\xff"), "not UTF-8"),
        (gguf_string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "unknown type 9"),
        (gguf_string("k") + struct.pack("<IIQ", ARRAY, 99, 1), "unknown type 99"),
        (gguf_string("k") + struct.pack("<IIQ", ARRAY, U8, 2**64 - 1), "claims"),
        (gguf_string("k") + struct.pack("<IIQ", ARRAY, F64, 2**61), "claims"),
        (gguf_string("k") + struct.pack("<IIQ", ARRAY, STRING, 9), "claims"),
        (gguf_string("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, 2**63), "past the end"),
        (gguf_string("k") + struct.pack("<IIQ", ARRAY, STRING, 4) + gguf_string("y" * 30), "past the end"),
    ],
)
def test_bad_keys(tmp_path: Path, body: bytes, why: str) -> None:
    refused(tmp_path, head(keys=1) + body + b"\0" * 16, why)


def test_duplicate_keys(tmp_path: Path) -> None:
    refused(tmp_path, head(keys=2) + 2 * (gguf_string("k") + gguf_value(U32, 1)) + b"\0" * 40, "duplicate key 'k'")


@pytest.mark.parametrize(
    "alignment", [(U32, 0), (U32, 13), (U32, 48), (U32, 2**31), (STRING, "32"), (I64, -32), (F32, 32.0), (BOOL, 1)]
)
def test_bad_alignment(tmp_path: Path, alignment: tuple) -> None:
    refused(tmp_path, gguf_bytes({"general.alignment": alignment}, ONE), "general.alignment")


def tensor(name: str = "w", code: int = 0, dims: tuple[int, ...] = (32, 2), data: bytes = b"\0" * 256):
    return name, code, dims, data


@pytest.mark.parametrize(
    "tensors, why",
    [
        ([tensor(""), tensor("b")], "name of a tensor is 0"),
        ([tensor("n" * 64)], "64 bytes long, not 1 to 63"),
        ([tensor(), tensor()], "duplicate tensor 'w'"),
        ([tensor(dims=())], "0 dimensions"),
        ([tensor(dims=(2, 2, 2, 2, 2))], "5 dimensions"),
        ([tensor(dims=(32, 0))], "no elements"),
        ([tensor(dims=(0, 32))], "no elements"),
        ([tensor(dims=(2**63, 2**63, 2**63, 4))], "truncated"),
        ([tensor(dims=(2**64 - 32, 1), code=2)], "truncated"),
        ([tensor(code=4)], "unknown type 4"),
        ([tensor(code=2**32 - 1)], "unknown type"),
        ([tensor(code=2, dims=(33, 2))], "rows of 33 elements"),
        ([tensor(code=12, dims=(32, 2))], "rows of 32 elements"),
        ([tensor(dims=(32, 3))], "truncated"),
    ],
)
def test_bad_tensors(tmp_path: Path, tensors: list, why: str) -> None:
    refused(tmp_path, gguf_bytes({}, tensors), why)


@pytest.mark.parametrize(
    "offset, why", [(1, "not a multiple of 32"), (2**64 - 32, "truncated"), (32, "truncated"), (0, "overlaps")]
)
def test_bad_offsets(tmp_path: Path, offset: int, why: str) -> None:
    tensors = [tensor("a"), tensor("w")]
    refused(tmp_path, gguf_bytes({}, tensors, offsets={"w": offset} if offset != 32 else {"w": 256 + 32}), why)
