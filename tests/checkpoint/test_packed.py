"""Packed checkpoints: bit-exact round trips, and invalid tile counts are rejected."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from deepseek_optimizer.checkpoint import open_checkpoint, stream_weights
from deepseek_optimizer.checkpoint.manifest import Manifest
from deepseek_optimizer.config import DeepSeekConfig
from deepseek_optimizer.errors import CheckpointError, ConfigError
from deepseek_optimizer.quant import FORMATS, SUPERBLOCKS, ColumnOrder, PackedMatrix, pack, unpack
from support.checkpoint_files import safetensors_bytes, safetensors_header, with_header
from support.packed_files import packed_fields, save_packed

CONFIG = {"model_type": "llama", "hidden_size": 48}


def weights() -> dict[str, PackedMatrix | torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, PackedMatrix | torch.Tensor] = {
        f"m.{name}.weight": pack(torch.randn(33, 256 if name in SUPERBLOCKS else 48, generator=generator), name)
        for name in FORMATS
    }
    made["norm.weight"] = torch.randn(48, generator=generator)
    made["half.bias"] = torch.randn(7, generator=generator).bfloat16()
    return made


def data(value: PackedMatrix | torch.Tensor) -> torch.Tensor:
    return value.data if isinstance(value, PackedMatrix) else value


def test_round_trip(tmp_path: Path) -> None:
    saved = weights()
    save_packed(tmp_path / "p", CONFIG, saved, precision="int4")
    checkpoint = open_checkpoint(tmp_path / "p")
    assert checkpoint.kind == "packed"
    config = checkpoint.config()
    assert config["quantization_config"]["precision"] == "int4"
    wanted = {name: value.format if isinstance(value, PackedMatrix) else None for name, value in saved.items()}
    shapes = {n: (v.rows, v.cols) if isinstance(v, PackedMatrix) else tuple(v.shape) for n, v in saved.items()}
    loaded = dict(stream_weights(checkpoint, wanted, shapes))
    for name, value in saved.items():
        assert torch.equal(data(loaded[name]), data(value)) and data(loaded[name]).dtype == data(value).dtype
        assert checkpoint.shape(name) == shapes[name]
        if isinstance(value, PackedMatrix):
            assert checkpoint.lossless_format(name) == checkpoint.natural_format(name) == value.format
            assert torch.equal(checkpoint.read_rows(name, 3, 20), checkpoint.read(name)[3:20])
    save_packed(tmp_path / "again", config, loaded, precision="int4")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "p" / "model.safetensors").read_bytes()


def test_the_order_of_columns_is_kept(tmp_path: Path) -> None:
    made = replace(weights()["m.int8.weight"], order=ColumnOrder(4, 3))
    save_packed(tmp_path / "p", CONFIG, {"m.int8.weight": made}, precision="int8")
    checkpoint = open_checkpoint(tmp_path / "p")
    assert checkpoint.packed("m.int8.weight", "int8").order == ColumnOrder(4, 3)
    assert torch.equal(checkpoint.read("m.int8.weight"), unpack(made))
    assert not torch.equal(unpack(made), unpack(made.as_stored))


@pytest.mark.parametrize("order", [[4], [4, 5], [0, 3], [4, -3], [4.0, 3], "43", None])
def test_wrong_orders_of_columns(order: Any) -> None:
    config = {"packed_manifest": {"version": 3, "modules": {"m": {"format": "int8", "shape": [33, 48], "column_order": order}}}}
    with pytest.raises(CheckpointError, match="column_order must be two positive integers whose product divides"):
        Manifest.read(config, Path("config.json"))


def test_files_are_plain_safetensors_and_aligned(tmp_path: Path) -> None:
    saved = weights()
    save_packed(tmp_path / "p", CONFIG, saved)
    with safe_open(tmp_path / "p" / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), data(value)) for name, value in saved.items())
    checkpoint = open_checkpoint(tmp_path / "p")
    for name, value in saved.items():
        if data(value).numel() * data(value).element_size() % 64 == 0:
            assert checkpoint.info(name).offset % 64 == 0, name


def test_another_format_is_rejected(tmp_path: Path) -> None:
    save_packed(tmp_path / "p", CONFIG, weights())
    with pytest.raises(CheckpointError, match="packed as int8, not int4.*original"):
        open_checkpoint(tmp_path / "p").packed("m.int8.weight", "int4")


def write(directory: Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


MATRIX = pack(torch.ones(33, 48), "int8")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"version": 5}, "another layout .*version 5.*version 4.*convert the original"),
        ({"version": True}, "another layout .*version True"),
        ({"version": None}, "another layout .*version None"),
        (
            {"version": 3, "modules": {"a": {"format": "fp8", "shape": [33, 48]}}},
            "another layout .*version 3 with fp8.*version 4",
        ),
        ({"curve": {}}, "curve must be a list"),
        ({"curve": [1]}, "curve must be a list"),
        ({"modules": []}, "modules must be"),
        ({"modules": {"a": {"format": "int8"}}}, "format and shape"),
        ({"modules": {"a": {"format": "int8", "shape": [33, 48], "x": 1}}}, "format and shape"),
        ({"modules": {"a": "int8"}}, "format and shape"),
        ({"modules": {"a": {"format": "int9", "shape": [33, 48]}}}, "unknown weight format 'int9'"),
        ({"modules": {"a": {"format": ["int8"], "shape": [33, 48]}}}, "unknown weight format"),
        ({"modules": {"a": {"format": "int8", "shape": [33]}}}, "two or three positive integers"),
        ({"modules": {"a": {"format": "int8", "shape": [33, -48]}}}, "two or three positive integers"),
        ({"modules": {"a": {"format": "int8", "shape": [33, True]}}}, "two or three positive integers"),
        ({"modules": {"a": {"format": "int8", "shape": [33, 2**40]}}}, "two or three positive integers"),
        ({"modules": {"a": {"format": "q4_k", "shape": [33, 48]}}}, "q4_k needs a multiple of 256 columns, not 48"),
        ({"modules": {"a": {"format": "int4", "shape": [33, 48]}}}, r"int4 \[33, 48\] must be U8 \(3, 2, 288\)"),
        ({"modules": {"a": {"format": "int8", "shape": [49, 48]}}}, r"must be U8 \(4, 2, 544\)"),
        ({"modules": {"a": {"format": "int8", "shape": [33, 65]}}}, r"must be U8 \(3, 3, 544\)"),
        ({"modules": {"b": {"format": "int8", "shape": [33, 48]}}}, "missing"),
        ({"modules": {}}, "does not describe it"),
    ],
)
def test_false_entries(tmp_path: Path, change: dict, why: str) -> None:
    fields = packed_fields({"a.weight": MATRIX})
    fields["packed_manifest"] |= change
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(write(tmp_path / "p", fields, {"a.weight": MATRIX.data}))


def test_version_3_differs_only_in_fp8(tmp_path: Path) -> None:
    fields = packed_fields({"a.weight": MATRIX})
    assert fields["packed_manifest"]["version"] == 4
    fields["packed_manifest"]["version"] = 3
    with open_checkpoint(write(tmp_path / "p", fields, {"a.weight": MATRIX.data})) as checkpoint:
        assert torch.equal(checkpoint.packed("a.weight", "int8").data, MATRIX.data)


@pytest.mark.parametrize("manifest", [None, [], "int8"])
def test_a_packed_checkpoint_without_a_manifest(tmp_path: Path, manifest: Any) -> None:
    fields = packed_fields({"a.weight": MATRIX}) | {"packed_manifest": manifest}
    with pytest.raises(CheckpointError, match="config.json: packed_manifest is missing or not an object; convert the original"):
        open_checkpoint(write(tmp_path / "p", fields, {"a.weight": MATRIX.data}))


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_layouts_are_named(tmp_path: Path, version: int) -> None:
    modules = {"a": {"format": "int8", "shape": [33, 48]}}
    section = {"quant_method": "deepseek_optimizer", "format_version": version, "modules": modules}
    directory = write(tmp_path / "p", {"quantization_config": section}, {"a.weight": MATRIX.data})
    with pytest.raises(
        CheckpointError, match=f"config.json: .*format_version {version}.*convert the original checkpoint again"
    ):
        open_checkpoint(directory)
    with pytest.raises(ConfigError, match=f"format_version {version}.*convert the original again"):
        DeepSeekConfig.from_dict(section)


def test_tiles_of_another_type(tmp_path: Path) -> None:
    section = packed_fields({"a.weight": MATRIX})
    with pytest.raises(CheckpointError, match="is F32"):
        open_checkpoint(write(tmp_path / "p", section, {"a.weight": MATRIX.data.float()}))


def test_truncated(tmp_path: Path) -> None:
    directory = write(tmp_path / "p", packed_fields({"a.weight": MATRIX}), {})
    header, body = safetensors_header({"a.weight": MATRIX.data})
    (directory / "model.safetensors").write_bytes(with_header(header, body[:-1]))
    with pytest.raises(CheckpointError, match="truncated") as caught:
        open_checkpoint(directory)
    assert caught.value.tensor == "a.weight"


def test_invalid_names() -> None:
    with pytest.raises(ValueError, match="must be a module's .weight"):
        Manifest.of({"a": MATRIX})


def test_a_manifest_is_immutable() -> None:
    manifest = Manifest.of({"a.weight": MATRIX, "norm.weight": torch.ones(3)}, [{"bits": 8.5, "chosen": True}])
    assert manifest.formats() == {"a": "int8"}
    with pytest.raises(TypeError):
        manifest.modules["b"] = manifest.modules["a"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        manifest.curve = ()  # type: ignore[misc]
    assert copy.deepcopy(manifest) == manifest == Manifest.read({"packed_manifest": manifest.to_dict()}, Path("config.json"))
    assert manifest.renamed(lambda name: f"model.{name}").formats() == {"model.a": "int8"}
