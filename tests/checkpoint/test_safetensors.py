"""Invalid safetensors files of every kind are rejected before their tensors are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.checkpoint.files import DataFile
from deepseek_optimizer.checkpoint.safetensors import open_safetensors
from deepseek_optimizer.errors import CheckpointError
from deepseek_optimizer.quant import pack
from support.checkpoint_files import safetensors_bytes, safetensors_header, with_header
from support.packed_files import save_packed

GOOD = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def opened(tmp_path: Path, data: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return open_safetensors(DataFile(path))


def refused(tmp_path: Path, data: bytes, why: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=why) as caught:
        opened(tmp_path, data)
    assert caught.value.file == str(tmp_path / "x.safetensors")
    return caught.value


def changed(name: str = "a", **fields: object) -> bytes:
    header, data = safetensors_header(GOOD)
    header[name] |= fields
    return with_header(header, data)


def test_a_valid_file(tmp_path: Path) -> None:
    actual = opened(tmp_path, safetensors_bytes(GOOD))
    assert {n: (t.dtype, t.shape) for n, t in actual.tensors.items()} == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
    assert actual.metadata == {"format": "pt"}
    assert (
        opened(tmp_path, safetensors_bytes({"empty": torch.empty(0, 5), "one": torch.tensor(1.0)})).tensors["one"].shape == ()
    )


def test_the_librarys_own_files(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "lib.safetensors")
    assert open_safetensors(DataFile(tmp_path / "lib.safetensors")).tensors.keys() == GOOD.keys()


@pytest.mark.parametrize("size", range(8))
def test_shorter_than_a_length(tmp_path: Path, size: int) -> None:
    refused(tmp_path, b"\0" * size, "at least 8")


def test_every_truncation(tmp_path: Path) -> None:
    whole = safetensors_bytes(GOOD)
    for size in range(len(whole)):
        with pytest.raises(CheckpointError):
            opened(tmp_path, whole[:size])


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001])
def test_header_too_long(tmp_path: Path, length: int) -> None:
    refused(tmp_path, length.to_bytes(8, "little") + b"{}", "more than 100000000")


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    refused(tmp_path, (50_000_000).to_bytes(8, "little") + b"{}", "truncated")


@pytest.mark.parametrize(
    "header, why",
    [
        (b"", "begin with"),
        (b" {}", "begin with"),
        (b"[]", "begin with"),
        (b'{"a": \xff}', "UTF-8"),
        (b"{", "not valid JSON"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "duplicate key 'dtype'"),
        (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": ' + b"[" * 100_000, "too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"__metadata__": {"x": 1}}', "__metadata__"),
        (b'{"__metadata__": []}', "__metadata__"),
        (b'{"a": 1}', "must have dtype, shape"),
        (b'{"a": {"dtype": "F32", "shape": []}}', "must have dtype, shape"),
    ],
)
def test_bad_headers(tmp_path: Path, header: bytes, why: str) -> None:
    refused(tmp_path, with_header(header), why)


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"dtype": "F33"}, "dtype 'F33' is not supported"),
        ({"dtype": None}, "is not supported"),
        ({"dtype": ["F32"]}, "is not supported"),
        ({"dtype": "F64"}, "takes 48 bytes"),
        ({"shape": [2, 4]}, "takes 32 bytes"),
        ({"shape": [-2, -3]}, "shape must be"),
        ({"shape": [True, 6]}, "shape must be"),
        ({"shape": [2.0, 3]}, "shape must be"),
        ({"shape": [2**62, 2**62, 2**62]}, "takes"),
        ({"shape": [2**64]}, "shape must be"),
        ({"shape": [1] * 9 + [6]}, "at most 8"),
        ({"shape": "23"}, "shape must be"),
        ({"data_offsets": [0]}, "two integers"),
        ({"data_offsets": [24, 0]}, "give -24"),
        ({"data_offsets": [-24, 0]}, "two integers"),
        ({"data_offsets": [0, 2**64]}, "two integers"),
        ({"data_offsets": [1000, 1024]}, "truncated"),
        ({"data_offsets": [8, 32]}, "hole|overlaps"),
        ({"extra": 1}, "nothing else"),
    ],
)
def test_bad_entries(tmp_path: Path, fields: dict, why: str) -> None:
    error = refused(tmp_path, changed(**fields), why)
    assert error.tensor in GOOD


def test_overlaps_holes_and_leftovers(tmp_path: Path) -> None:
    refused(tmp_path, changed("b", data_offsets=[16, 24]), "overlaps")
    header, data = safetensors_header(GOOD)
    header["b"]["data_offsets"] = [26, 34]
    refused(tmp_path, with_header(header, data[:24] + b"??" + data[24:]), "gap of 2 bytes")
    refused(tmp_path, safetensors_bytes(GOOD) + b"x", "1 bytes after")


def test_false_sizes_allocate_no_memory(tmp_path: Path) -> None:
    """A header that claims 2^62 bytes needs no more memory than one that does not."""
    import tracemalloc

    (tmp_path / "x.safetensors").write_bytes(changed(shape=[2**60], data_offsets=[0, 2**62]))
    file = DataFile(tmp_path / "x.safetensors")
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        open_safetensors(file)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


# ---- directories


def save_model(directory: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


def save_sharded(directory: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for name, tensors in shards.items():
        (directory / name).write_bytes(safetensors_bytes(tensors))
    result = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": result if weight_map is None else weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_read_and_read_rows(tmp_path: Path) -> None:
    tensors = {
        "m": torch.randn(50, 7),
        "h": torch.randn(5, 3).half(),
        "d": torch.randn(4, 2).double(),
        "v": torch.randn(9).bfloat16(),
    }
    with open_checkpoint(save_model(tmp_path / "m", tensors)) as checkpoint:
        assert checkpoint.kind == "safetensors"
        for name, tensor in tensors.items():
            expected = tensor.float() if tensor.dtype == torch.float64 else tensor
            assert torch.equal(checkpoint.read(name), expected) and checkpoint.read(name).dtype == expected.dtype
        assert torch.equal(checkpoint.read_rows("m", 13, 29), tensors["m"][13:29])
        with pytest.raises(CheckpointError, match="missing") as caught:
            checkpoint.read("nothing")
        assert caught.value.tensor == "nothing"


def test_integers_are_not_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path / "m", {"w": torch.ones(4, 4, dtype=torch.uint8)}))
    with pytest.raises(CheckpointError, match="stored as U8"):
        checkpoint.packed("w", "int8")


def test_shards(tmp_path: Path) -> None:
    good = {"model-1.safetensors": {"a": torch.ones(2)}, "sub/model-2.safetensors": {"b": torch.zeros(3)}}
    (tmp_path / "m" / "sub").mkdir(parents=True)
    checkpoint = open_checkpoint(save_sharded(tmp_path / "m", good))
    assert torch.equal(checkpoint.read("b"), torch.zeros(3)) and set(checkpoint.tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "weight_map, why",
    [
        ({"a": "one.safetensors", "b": "gone.safetensors"}, "gone.safetensors.*does not exist"),
        ({"a": "../one.safetensors"}, "not inside"),
        ({"a": "sub/../../one.safetensors"}, "not inside"),
        ({"a": "/etc/passwd"}, "not inside"),
        ({"a": "..\\one.safetensors"}, "not inside"),
        ({"a": "C:one.safetensors"}, "not inside"),
        ({"a": "one\0.safetensors"}, "not inside"),
        ({"a": ""}, "not inside"),
        ({"a": "9" * 400}, "does not exist"),
        ({"a": "\ud800"}, "cannot be resolved"),
        ({"a": "out.safetensors"}, "outside the checkpoint"),
        ({"a": "loop.safetensors"}, "resolved|does not exist|opened"),
        ({"a": "fifo"}, "not a regular file"),
        ({"a": "sub"}, "not a regular file"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "'c'.*is not in one.safetensors"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, "is not in two"),
        ({"b": "two.safetensors", "a": "copy.safetensors", "x": "one.safetensors"}, "in one shard only"),
        ({"b": "both.safetensors"}, "'a2'.*not listed"),
        ({}, "weight_map"),
        ([], "weight_map"),
        ({"a": 3}, "weight_map"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: object, why: str) -> None:
    outside = tmp_path / "one.safetensors"
    outside.write_bytes(safetensors_bytes({"a": torch.ones(2)}))
    shards = {
        "one.safetensors": {"a": torch.ones(2)},
        "two.safetensors": {"b": torch.ones(2)},
        "copy.safetensors": {"a": torch.ones(2)},
        "both.safetensors": {"b": torch.ones(2), "a2": torch.ones(1)},
    }
    directory = save_sharded(tmp_path / "m", shards, weight_map)  # type: ignore[arg-type]
    (directory / "sub").mkdir()
    (directory / "out.safetensors").symlink_to(outside)
    (directory / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(directory / "fifo")
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(directory)


def test_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "c").write_text('{"model_type": "llama"}')
    (blobs / "w").write_bytes(safetensors_bytes(GOOD))
    (snapshot / "config.json").symlink_to("../../blobs/c")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    assert open_checkpoint(snapshot).tensors.keys() == GOOD.keys()
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert open_checkpoint(link).tensors.keys() == GOOD.keys()
    (tmp_path / "w").write_bytes(safetensors_bytes(GOOD))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../w")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    "text, why",
    [
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"model_type": "llama", "model_type": "qwen2"}', "duplicate key"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 200_000, "too deep"),
    ],
)
def test_bad_config_json(tmp_path: Path, text: bytes, why: str) -> None:
    save_model(tmp_path / "m", GOOD)
    (tmp_path / "m" / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(tmp_path / "m")


def test_config_is_a_copy_without_code(tmp_path: Path) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}, "rope_parameters": {"rope_theta": 1.0}}
    checkpoint = open_checkpoint(save_model(tmp_path / "m", GOOD, config))
    assert "auto_map" not in checkpoint.config()
    checkpoint.config()["rope_parameters"]["rope_theta"] = 2.0
    assert checkpoint.config()["rope_parameters"]["rope_theta"] == 1.0


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    torch.save(Bomb(), directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*save_pretrained"):
        open_checkpoint(directory)
    assert not (tmp_path / "exploded").exists()


def test_paths_that_are_not_checkpoints(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, "no config.json"),
        ("a\0b", "does not exist"),
        ("9" * 400, "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=why):
            open_checkpoint(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=r"give the path of one of them: a\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(CheckpointError, match="give the path of its directory"):
        open_checkpoint(tmp_path / "w.safetensors")


def test_file_truncated_after_opening(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path / "m", {"w": torch.ones(100, 100)}))
    os.truncate(tmp_path / "m" / "model.safetensors", 20_000)
    with pytest.raises(CheckpointError, match="truncated while"):
        checkpoint.read("w")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    directory = save_model(tmp_path / "m", {"w": torch.ones(100, 100)})
    before = open_files()
    open_checkpoint(directory).close()
    (directory / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError):
        open_checkpoint(directory)
    assert open_files() == before


def test_a_mapped_tensor_outlives_its_checkpoint_and_never_writes(tmp_path: Path) -> None:
    matrix = pack(torch.randn(40, 64), "int8")
    save_packed(tmp_path / "p", {"model_type": "llama"}, {"m.weight": matrix})
    before = (tmp_path / "p" / "model.safetensors").read_bytes()
    with open_checkpoint(tmp_path / "p") as checkpoint:
        data = checkpoint.packed("m.weight", "int8").data
    del checkpoint
    assert torch.equal(data, matrix.data)
    data.zero_()
    assert (tmp_path / "p" / "model.safetensors").read_bytes() == before
