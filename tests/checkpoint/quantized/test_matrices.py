"""Every method's matrices against independent packers: dequantized to the bit, and kept where a format can hold them."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.checkpoint import QuantizedCheckpoint, open_checkpoint
from deepseek_optimizer.checkpoint import base as checkpoint_base
from deepseek_optimizer.checkpoint.quantized.affine import AffineRows
from support import quantized_files as files
from support.quantized_files import SECTIONS, compressed_section, write_checkpoint

NAME = "m.q_proj"
AUTO_ROUND = {
    "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "packing_format": "auto_round:auto_gptq",
    "iters": 200, "autoround_version": "0.16.1", "data_type": "int",
}  # fmt: skip


def case(id, packer, section, shape, natural, exact, **options):
    return pytest.param(packer, section, shape, natural, exact, options, id=id)


def gptq_case(id, shape, natural, exact, **options):
    section = SECTIONS["gptq"] | {
        "bits": options.get("bits", 4), "group_size": options.get("size", 32), "sym": options.get("symmetric", True),
        "desc_act": options.get("ordered", False), "checkpoint_format": "gptq_v2" if options.get("version") == 2 else "gptq",
    }  # fmt: skip
    return case(f"gptq-{id}", files.gptq, section, shape, natural, exact, **options)


def packed_case(id, shape, natural, exact, **options):
    size = options.get("size", 32)
    weights = {"num_bits": options.get("bits", 4), "type": "int", "symmetric": options.get("symmetric", True)}
    weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    return case(
        f"packed-{id}", files.pack_quantized, compressed_section("pack-quantized", **weights), shape, natural, exact, **options
    )


# natural: the default format; exact: the format that holds the values exactly.
CASES = [
    gptq_case("sym", (40, 96), "int4", "int4"),
    gptq_case("group64", (64, 192), "int4", "int4", size=64),
    gptq_case("group128", (136, 320), "int4", "int4", size=128),
    gptq_case("channel", (48, 160), "int4", "int4", size=-1),
    gptq_case("no-g_idx", (40, 96), "int4", "int4", g_idx=False),
    gptq_case("v2", (40, 96), "int4", "int4", version=2),
    gptq_case("asym", (40, 96), "q4_1", "int8", symmetric=False),
    gptq_case("asym-v2", (72, 128), "q4_1", "int8", symmetric=False, version=2, size=64),
    gptq_case("ordered", (64, 256), "q4_1", None, ordered=True),
    gptq_case("ordered-asym", (64, 256), "q4_1", None, ordered=True, symmetric=False, size=128),
    gptq_case("ordered-one-group", (64, 64), "int4", "int4", ordered=True, size=-1),
    gptq_case("group16", (64, 64), "q4_1", None, size=16),
    gptq_case("8bit", (40, 96), "int8", "int8", bits=8),
    gptq_case("8bit-asym", (40, 96), "int8", None, bits=8, symmetric=False),
    gptq_case("8bit-ordered", (40, 96), "int8", None, bits=8, ordered=True),
    gptq_case("2bit", (48, 96), "int4", "int4", bits=2, symmetric=False),
    gptq_case("odd", (19, 45), "int4", "int4", size=-1),
    gptq_case("odd-groups", (21, 333), "int4", "int4", size=64),
    case("auto-round", files.gptq, AUTO_ROUND, (40, 96), "int4", "int4", g_idx=False),
    case("auto-round-asym", files.gptq, AUTO_ROUND | {"sym": False}, (40, 96), "q4_1", "int8", g_idx=False, symmetric=False),
    case("auto-round-awq", files.awq, AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, (40, 96), "q4_1", "int8"),
    case("awq", files.awq, SECTIONS["awq"], (40, 96), "q4_1", "int8"),
    case("awq-128", files.awq, SECTIONS["awq"] | {"group_size": 128}, (136, 384), "q4_1", "int8", size=128),
    case("awq-channel", files.awq, SECTIONS["awq"] | {"group_size": -1}, (24, 77), "q4_1", "int8", size=-1),
    packed_case("sym", (40, 96), "int4", "int4"),
    packed_case("group128", (37, 256), "int4", "int4", size=128),
    packed_case("channel", (37, 83), "int4", "int4", size=-1),
    packed_case("asym", (37, 96), "q4_1", "int8", symmetric=False),
    packed_case("asym-channel", (37, 83), "q4_1", "int8", symmetric=False, size=-1),
    packed_case("ordered", (40, 128), "q4_1", None, ordered=True),
    packed_case("8bit", (37, 96), "int8", "int8", bits=8),
    packed_case("fp16-scales", (40, 96), "int4", "int4", scale_dtype=torch.float16),
    case("int8", files.int_quantized, compressed_section("int-quantized", num_bits=8, type="int", strategy="channel"), (37, 83),
         "int8", "int8"),
    case("int8-asym", files.int_quantized, compressed_section("int-quantized", num_bits=8, type="int", strategy="channel"),
         (37, 83), "int8", None, symmetric=False),
    case("float-channel", files.float_quantized, compressed_section("float-quantized", num_bits=8, type="float"), (140, 150),
         "int8", None),
    case("float-tensor", files.float_quantized, compressed_section("float-quantized", num_bits=8, type="float"), (140, 150),
         "fp8", "fp8", per_row=False),
    case("fbgemm", files.float_quantized, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 9.0}, (140, 150), "int8", None),
    case("fp8-tensor", files.float_quantized, {"quant_method": "fp8", "activation_scheme": "static"}, (140, 150), "fp8", "fp8",
         per_row=False, suffix=".weight_scale_inv"),
    case("fp8-channel", files.float_quantized, {"quant_method": "fp8", "fmt": "e4m3"}, (140, 150), "int8", None),
    case("nf4", files.bitsandbytes_4bit, SECTIONS["nf4"], (24, 96), "q4_1", None),
    case("bnb-unnamed", files.bitsandbytes_int8, {"load_in_8bit": True}, (24, 96), "int8", None),
    case("nf4-plain", files.bitsandbytes_4bit, SECTIONS["nf4"], (24, 96), "q4_1", None, nested=False),
    case("nf4-bf16", files.bitsandbytes_4bit, SECTIONS["nf4"], (24, 96), "q4_1", None, storage=torch.bfloat16),
    case("nf4-odd", files.bitsandbytes_4bit, SECTIONS["nf4"], (23, 51), "q4_1", None),
    case("fp4", files.bitsandbytes_4bit, SECTIONS["fp4"], (24, 96), "q4_1", None, kind="fp4", block=128, nested=False),
    case("bnb-int8", files.bitsandbytes_int8, SECTIONS["bnb_int8"], (37, 83), "int8", None),
]  # fmt: skip


def written(tmp_path, packer, section, shape, options, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    parts, values = packer(weight, **options)
    tensors = {NAME + suffix: part for suffix, part in parts.items()} | {"m.norm.weight": torch.ones(8)}
    return write_checkpoint(tmp_path / "m", tensors, section), values


@pytest.mark.parametrize("panel", [700, 1 << 21])
@pytest.mark.parametrize(("packer", "section", "shape", "natural", "exact", "options"), CASES)
def test_dequantized_to_the_bit(tmp_path, monkeypatch, packer, section, shape, natural, exact, options, panel):
    monkeypatch.setattr(checkpoint_base, "PANEL_ELEMENTS", panel)
    path, values = written(tmp_path, packer, section, shape, options)
    weight = f"{NAME}.weight"
    with open_checkpoint(path) as checkpoint:
        assert isinstance(checkpoint, QuantizedCheckpoint) and "quantization_config" not in checkpoint.config()
        assert checkpoint.tensors.keys() == {weight, "m.norm.weight"}
        assert checkpoint.shape(weight) == shape and checkpoint.natural_format(weight) == natural
        assert torch.equal(checkpoint.read(weight), values)
        for begin, end in ((0, 3), (5, 17), (shape[0] - 1, shape[0])):
            assert torch.equal(checkpoint.read_rows(weight, begin, end), values[begin:end])
        for format in ("fp32", "bf16"):
            assert torch.equal(checkpoint.packed(weight, format).data, quant.get_format(format).pack(values))
        if exact is not None:
            assert torch.equal(quant.unpack(checkpoint.packed(weight, exact)), values), "nothing is rounded"
        assert checkpoint.lossless_format(weight) in (None, exact)


@pytest.mark.parametrize(("zero", "top"), [(128, 9), (0, 9), (16, 15), (255, 255), (8, 15)])
@pytest.mark.parametrize("listed", [True, False])
def test_small_codes_under_any_zero_point(zero, top, listed):
    """A panel may happen to have small codes only; differences are exact all the same."""
    codes = torch.randint(0, top + 1, (16, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales = torch.full((16, 2), 0.5)
    zeros = torch.full((16, 2), zero, dtype=torch.int16) if listed else None
    rows = AffineRows(codes, scales, zeros, zero, 32)
    wanted = (codes.float() - zero) * 0.5
    assert torch.equal(rows.floats(), wanted)
    kept = rows.kept("int8")
    assert (kept is None) == bool((wanted.abs() > 64).any())
    if kept is not None:
        packed = quant.PackedMatrix("int8", 16, 64, quant.reference_packer(kept.weight, "int8"))
        assert torch.equal(quant.unpack(packed), wanted)


def test_mxfp4_stacks(tmp_path):
    """gpt-oss's experts: exact as float, as mxfp4, and as int8 if the scales are float16 values, which may span all of E8M0.
    The rows of gate and up alternate in the file; the loaded stack has gate before up."""
    stack = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    parts, values = files.mxfp4(stack)
    extreme, extreme_values = files.mxfp4(stack * torch.logspace(-36, 36, 3)[:, None, None])
    tensors = {f"m.experts.down_proj{suffix}": part for suffix, part in parts.items()}
    tensors |= {f"m.experts.gate_up_proj{suffix}": part for suffix, part in extreme.items()}
    tensors["m.experts.down_proj_bias"] = torch.zeros(3, 40).bfloat16()
    with open_checkpoint(write_checkpoint(tmp_path / "m", tensors, SECTIONS["mxfp4"])) as checkpoint:
        name = "m.experts.down_proj"
        assert checkpoint.shape(name) == (3, 40, 96) and checkpoint.own_format(name, (3, 40, 96)) == "mxfp4"
        assert torch.equal(checkpoint.read(name), values)
        assert torch.equal(checkpoint.read_rows(name, 37, 83), values.flatten(0, 1)[37:83])
        for format in ("mxfp4", "int8"):
            packed = checkpoint.packed_stack(name, format, (3, 40, 96))
            assert torch.equal(torch.stack([quant.unpack(packed.matrix(i)) for i in range(3)]), values)
        gate_up = "m.experts.gate_up_proj"
        ordered = torch.cat((extreme_values[:, ::2], extreme_values[:, 1::2]), 1)
        assert torch.equal(checkpoint.read(gate_up), ordered)
        assert torch.equal(checkpoint.read_rows(gate_up, 13, 75), ordered.flatten(0, 1)[13:75])
        packed = checkpoint.packed_stack(gate_up, "mxfp4", (6, 20, 96))
        assert torch.equal(torch.cat([quant.unpack(packed.matrix(i)) for i in range(6)]), ordered.flatten(0, 1))
        assert checkpoint.conversions() == []
        assert checkpoint.read("m.experts.down_proj_bias").dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-7, 3.3e-6, 7e4])
def test_scales_that_are_no_float16_values(tmp_path, scale):
    """Subnormal ones are rounded, with a warning; those beyond float16 are left to the format's own packer."""
    codes = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    tensors = {f"{NAME}.weight": codes, f"{NAME}.weight_scale": torch.full((16, 1), scale, dtype=torch.bfloat16)}
    section = compressed_section("int-quantized", num_bits=8, type="int", strategy="channel")
    with open_checkpoint(write_checkpoint(tmp_path / "m", tensors, section)) as checkpoint:
        name = f"{NAME}.weight"
        values, ours = checkpoint.read(name), quant.unpack(checkpoint.packed(name, "int8"))
        half = tensors[f"{NAME}.weight_scale"].float().half()
        (warning,) = checkpoint.conversions()
        if half.isfinite().all():
            assert torch.equal(ours, codes.float() * half.float()) and "rounds scales and minima to float16" in warning
        else:
            assert "rounds them again" in warning and torch.equal(ours, quant.unpack(quant.pack(values, "int8")))
