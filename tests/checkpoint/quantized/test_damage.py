"""Damaged and unknown checkpoints of other quantizers: refused when they are opened, or when the damaged part is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.errors import CheckpointError, UnsupportedModelError
from support import quantized_files as files
from support.quantized_files import SECTIONS, compressed_section, write_checkpoint

NAME = "m.q_proj"
W4A16 = compressed_section("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
W8A8 = compressed_section("int-quantized", num_bits=8, type="int", strategy="channel")
SOURCES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gptq": (files.gptq, SECTIONS["gptq"], {"ordered": True}),
    "awq": (files.awq, SECTIONS["awq"], {}),
    "auto-round": (files.gptq, {"quant_method": "auto-round", "bits": 4, "group_size": 32}, {}),
    "packed": (files.pack_quantized, W4A16, {"symmetric": False, "ordered": True}),
    "int8": (files.int_quantized, W8A8, {"symmetric": False}),
    "nf4": (files.bitsandbytes_4bit, SECTIONS["nf4"], {}),
    "bnb-int8": (files.bitsandbytes_int8, SECTIONS["bnb_int8"], {}),
    "mxfp4": (lambda w: files.mxfp4(w[None]), SECTIONS["mxfp4"], {}),
}
WEIGHT = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))


def made(tmp_path, method, **section):
    """Its path, and a function that changes its tensors."""
    packer, fields, options = SOURCES[method]
    tensors = {NAME + suffix: part for suffix, part in packer(WEIGHT, **options)[0].items()}
    path = write_checkpoint(tmp_path / "m", tensors, fields | section)

    def change(suffix: str, tensor: torch.Tensor | None) -> str:
        stored = load_file(path / "model.safetensors")
        stored.pop(NAME + suffix, None)
        if tensor is not None:
            stored[NAME + suffix] = tensor.contiguous()
        save_file(stored, path / "model.safetensors")
        return NAME + suffix

    return path, change, tensors


PARTS = [
    ("gptq", ".qzeros", ".qweight"), ("gptq", ".scales", ".qweight"), ("awq", ".qzeros", ".qweight"),
    ("awq", ".scales", ".qweight"), ("packed", ".weight_scale", ".weight_packed"),
    ("packed", ".weight_shape", ".weight_packed"), ("int8", ".weight_scale", ".weight"),
    ("nf4", ".weight.absmax", ".weight.quant_state.bitsandbytes__nf4"),
    ("nf4", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"),
    ("nf4", ".weight.nested_absmax", ".weight.quant_state.bitsandbytes__nf4"),
    ("nf4", ".weight", ".weight.quant_state.bitsandbytes__nf4"), ("bnb-int8", ".weight", ".SCB"),
    ("mxfp4", "_scales", "_blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "missing", "owner"), PARTS)
def test_a_missing_part(tmp_path, method, missing, owner):
    path, change, _ = made(tmp_path, method)
    change(missing, None)
    with pytest.raises(CheckpointError, match=f"needs {NAME}{missing}, which is missing") as caught:
        open_checkpoint(path)
    assert caught.value.tensor == NAME + owner and caught.value.file.endswith("model.safetensors")


MORE_PARTS = [
    ("gptq", ".g_idx"), ("gptq", ".qweight"), ("awq", ".qweight"), ("packed", ".weight_zero_point"),
    ("packed", ".weight_g_idx"), ("packed", ".weight_packed"), ("int8", ".weight_zero_point"), ("mxfp4", "_blocks"),
]  # fmt: skip
# Fewer columns, and the same bytes: as valid as before.
VALID = {("gptq", ".g_idx", "short"), ("awq", ".qweight", "short"), ("nf4", ".weight", "flat")}
FORMS = [
    (method, part, how)
    for method, part in [(method, part) for method, part, _ in PARTS] + MORE_PARTS
    for how in ("short", "flat", "dtype")
    if (method, part, how) not in VALID
]


@pytest.mark.parametrize(("method", "part", "how"), FORMS)
def test_a_part_of_another_form(tmp_path, method, part, how):
    path, change, tensors = made(tmp_path, method)
    tensor = tensors[NAME + part]
    changed = {"short": tensor[:-1], "flat": tensor[None], "dtype": tensor.to(torch.int16)}[how]
    change(part, changed)
    with pytest.raises(CheckpointError) as caught:  # the error may name the tensor that does not fit it
        open_checkpoint(path)
    assert caught.value.tensor.startswith(NAME) and caught.value.file.endswith("model.safetensors")


def spoil(method, part, value, index):
    return pytest.param(method, part, value, index, id=f"{method}{part}-{value}")


@pytest.mark.parametrize(
    ("method", "part", "value", "index"),
    [
        spoil("gptq", ".scales", torch.nan, (2, 60)), spoil("gptq", ".scales", torch.inf, (0, 60)),
        spoil("awq", ".scales", torch.nan, (2, 60)),
        spoil("packed", ".weight_scale", torch.inf, (60, 0)),
        spoil("int8", ".weight_scale", torch.nan, (60, 0)), spoil("nf4", ".weight.nested_absmax", torch.nan, 0),
        spoil("nf4", ".weight.quant_map", torch.nan, 3), spoil("bnb-int8", ".SCB", torch.inf, 60),
        spoil("mxfp4", "_scales", 255, (0, 60, 2)),
    ],
)  # fmt: skip
def test_damaged_values(tmp_path, method, part, value, index):
    path, change, tensors = made(tmp_path, method)
    tensor = tensors[NAME + part].clone()
    tensor[index] = value
    name = change(part, tensor)
    with open_checkpoint(path) as checkpoint:
        (weight,) = checkpoint.tensors
        rows = checkpoint.shape(weight)[-2]
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read_rows(weight, rows - 8, rows)
        assert caught.value.tensor == name
        with pytest.raises(CheckpointError):
            checkpoint.pack_rows(weight, 0, rows, checkpoint.natural_format(weight), None, None)


@pytest.mark.parametrize(("method", "part"), [("gptq", ".g_idx"), ("packed", ".weight_g_idx")])
@pytest.mark.parametrize("value", [3, -2])
def test_groups_that_do_not_exist(tmp_path, method, part, value):
    path, change, tensors = made(tmp_path, method)
    groups = tensors[NAME + part].clone()
    groups[95] = value
    name = change(part, groups)
    with pytest.raises(CheckpointError, match="contains the group") as caught:
        open_checkpoint(path)
    assert caught.value.tensor == name and caught.value.file.endswith("model.safetensors")


@pytest.mark.parametrize(
    "state",
    [b"{", b"[]", b"{}", b'{"shape": [64], "blocksize": 64}', b'{"shape": [64, -96], "blocksize": 64}',
     b'{"shape": [64, 96], "blocksize": 0}', b'{"shape": [65, 96], "blocksize": 64}', b'{"shape": [64, 96], "blocksize": "a"}',
     b'{"shape": [64, 96], "blocksize": 64, "nested_blocksize": 256, "nested_offset": "a"}',
     b'{"shape": [64, 96], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 1' + b"0" * 400 + b"}"],
)  # fmt: skip
def test_damaged_descriptions_of_bitsandbytes(tmp_path, state):
    path, change, _ = made(tmp_path, "nf4")
    change(".weight.quant_state.bitsandbytes__nf4", torch.frombuffer(bytearray(state), dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*m\.q_proj"):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [[64, -96], [0, 96], [64, 1 << 62], [63, 96], [64, 105]])
def test_a_wrong_shape_of_packed_weights(tmp_path, shape):
    path, change, _ = made(tmp_path, "packed")
    change(".weight_shape", torch.tensor(shape))
    with pytest.raises(CheckpointError, match=r"weight_packed.*is not that of"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("gptq", "bits", 3), ("gptq", "bits", None), ("gptq", "bits", 4.0), ("gptq", "group_size", 0),
        ("gptq", "group_size", 1 << 70),
        ("gptq", "sym", "yes"), ("gptq", "checkpoint_format", "marlin"), ("gptq", "is_marlin_format", True),
        ("gptq", "pack_dtype", "int8"), ("gptq", "rotation", "hadamard"), ("awq", "version", "gemv"), ("awq", "bits", 3),
        ("awq", "zero_point", False), ("awq", "format", "llm-awq"), ("awq", "twist", 1),
        ("packed", "format", "nvfp4-pack-quantized"),
        ("packed", "config_groups", []), ("packed", "config_groups", {"a": ["Linear"]}),
        ("packed", "transform_config", {"a": 1}),
        ("packed", "sparsity_config", {"format": "sparse-24-bitmask"}), ("packed", "twist", 1), ("nf4", "twist", 1),
        ("nf4", "bnb_4bit_quant_type", "af4"), ("auto-round", "packing_format", "auto_round:llm_compressor"),
        ("auto-round", "rotation_config", {}), ("mxfp4", "twist", 1),
    ],
)  # fmt: skip
def test_fields_and_values_that_are_not_known(tmp_path, method, field, value):
    path, _, _ = made(tmp_path, method, **{field: value})
    quantizer = SOURCES[method][1]["quant_method"]
    with pytest.raises(UnsupportedModelError, match=rf"config\.json: quantization_config\.{field}.* of {quantizer} "):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "weights",
    [{"num_bits": 3}, {"type": "float", "num_bits": 4}, {"group_size": 0}, {"group_size": "32"},
     {"num_bits": 8, "type": "float", "block_structure": [128, 0]}],
)  # fmt: skip
def test_schemes_of_compressed_tensors_that_are_not_supported(tmp_path, weights):
    section = compressed_section("pack-quantized", **{"num_bits": 4, "type": "int", "group_size": 32, **weights})
    path, _, _ = made(tmp_path, "packed", config_groups=section["config_groups"])
    with pytest.raises(UnsupportedModelError, match=r"quantization_config\.config_groups\.group_0\.weights"):
        open_checkpoint(path)


def test_a_weight_that_is_stored_twice(tmp_path):
    path, change, _ = made(tmp_path, "gptq")
    name = change(".weight", WEIGHT)
    with pytest.raises(CheckpointError, match="stored twice") as caught:
        open_checkpoint(path)
    assert caught.value.tensor == name


@pytest.mark.parametrize("method", ["gptq", "packed"])
def test_columns_in_order_need_no_list(tmp_path, method):
    """A list that says what group_size says, or only -1 (compressed-tensors), changes nothing: the codes are kept."""
    packer, section, _ = SOURCES[method]
    parts, values = packer(WEIGHT)
    tensors = {NAME + suffix: part for suffix, part in parts.items()}
    if method == "packed":
        tensors[f"{NAME}.weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    with open_checkpoint(write_checkpoint(tmp_path / "m", tensors, section)) as checkpoint:
        name = f"{NAME}.weight"
        assert torch.equal(checkpoint.read(name), values)
        checkpoint.packed(name, "int4")
        assert checkpoint.conversions() == [
            f"1 matrix converted from {checkpoint.info(name).dtype} to int4, which is exact"
        ] or (checkpoint.conversions() == [])


def test_scales_of_activations_are_left_out(tmp_path):
    path, change, _ = made(tmp_path, "int8")
    change(".input_scale", torch.ones(1))
    change(".k_scale", torch.ones(1))
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == [f"{NAME}.weight"]
        assert checkpoint.remarks() == ["2 scales of activations or of the cache are left out: the plan computes its own"]


def test_float16_matrices_become_bf16(tmp_path):
    """The embedding and the head of most such checkpoints: fp32 would double their size."""
    parts, _ = files.gptq(WEIGHT)
    tensors = {NAME + suffix: part for suffix, part in parts.items()}
    tensors |= {"m.embed.weight": torch.randn(40, 64).half(), "m.head.weight": torch.randn(40, 64)}
    with open_checkpoint(write_checkpoint(tmp_path / "m", tensors, SECTIONS["gptq"])) as checkpoint:
        formats = {name: checkpoint.natural_format(name) for name in checkpoint.tensors}
        assert formats == {f"{NAME}.weight": "int4", "m.embed.weight": "bf16", "m.head.weight": "fp32"}
        for name, format in formats.items():
            checkpoint.packed(name, format)
        assert checkpoint.conversions() == ["1 matrix converted from F16 to bf16, which rounds them again"]


def test_bits_and_groups_of_single_layers(tmp_path):
    """GPTQModel's `dynamic`: a layer's own bits and group size follow from its tensors."""
    tensors, values = {}, {}
    for layer, options in {"a": {}, "b": {"bits": 8}, "c": {"size": 64, "bits": 4}}.items():
        parts, values[f"m.{layer}.weight"] = files.gptq(torch.randn(64, 128), **options)
        tensors |= {f"m.{layer}{suffix}": part for suffix, part in parts.items()}
    section = SECTIONS["gptq"] | {"dynamic": {"+:b": {"bits": 8}, "+:c": {"group_size": 64}}}
    with open_checkpoint(write_checkpoint(tmp_path / "m", tensors, section)) as checkpoint:
        for name, value in values.items():
            assert torch.equal(checkpoint.read(name), value)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"quantization_config": SECTIONS["gptq"]}))
    with pytest.raises(CheckpointError, match="4-bit GPTQ with groups of 32"):
        open_checkpoint(tmp_path / "m")
