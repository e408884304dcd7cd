"""FP8 checkpoints: read unchanged, dequantized, or rejected with an error that names the tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepseek_optimizer import quant
from deepseek_optimizer.checkpoint import QuantizedCheckpoint, open_checkpoint, stream_weights
from deepseek_optimizer.checkpoint import base as checkpoint_base
from deepseek_optimizer.errors import CheckpointError, ConfigError, UnsupportedModelError
from deepseek_optimizer.quant import fp8
from support.fp8_files import SECTION, dequantized, fp8_tensors

GENERATOR = torch.Generator().manual_seed(3)
FLOATS = {
    "m.a_proj.weight": torch.randn(300, 170, generator=GENERATOR),
    "m.b_proj.weight": torch.randn(100, 260, generator=GENERATOR) * torch.logspace(-6, 2, 100)[:, None],
    "m.embed.weight": torch.randn(40, 64, generator=GENERATOR).bfloat16(),
    "m.norm.weight": torch.ones(64),
}
A, SCALES = "m.a_proj.weight", "m.a_proj.weight_scale_inv"


def write(folder: Path, tensors: dict[str, torch.Tensor], **section: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": SECTION | section}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def stored(scale_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return fp8_tensors(FLOATS, lambda name: "_proj" in name, scale_dtype)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("panel", [700, 1 << 21])
def test_kept_unchanged_or_dequantized(tmp_path, monkeypatch, scale_dtype, panel):
    monkeypatch.setattr(checkpoint_base, "PANEL_ELEMENTS", panel)
    tensors = stored(scale_dtype)
    real = dequantized(tensors)
    with open_checkpoint(write(tmp_path / "m", tensors)) as checkpoint:
        assert isinstance(checkpoint, QuantizedCheckpoint) and checkpoint.tensors.keys() == FLOATS.keys()
        assert "quantization_config" not in checkpoint.config()
        for name in FLOATS:
            assert torch.equal(checkpoint.read(name), real[name])
        assert torch.equal(checkpoint.read_rows(A, 120, 135), real[A][120:135])
        assert {name: checkpoint.natural_format(name) for name in FLOATS} == {
            A: "fp8", "m.b_proj.weight": "fp8", "m.embed.weight": "bf16", "m.norm.weight": "fp32",
        }  # fmt: skip
        for name in (A, "m.b_proj.weight"):
            packed = checkpoint.packed(name, "fp8")
            assert torch.equal(quant.unpack(packed), real[name]), "nothing is rounded"
            scale = tensors[f"{name}_scale_inv"].float()
            assert torch.equal(packed.data, fp8.repack(tensors[name], scale))
            for format in ("int4", "int8", "bf16", "fp32"):
                assert torch.equal(checkpoint.packed(name, format).data, quant.get_format(format).pack(real[name]))
        shapes = {name: tuple(tensor.shape) for name, tensor in FLOATS.items()}
        wanted = {A: "fp8", "m.b_proj.weight": "int8", "m.embed.weight": "fp8", "m.norm.weight": None}
        loaded = dict(stream_weights(checkpoint, wanted, shapes))
        assert torch.equal(loaded["m.embed.weight"].data, quant.get_format("fp8").pack(FLOATS["m.embed.weight"]))


def test_stacks_of_experts(tmp_path):
    """Tensor by tensor, as published by DeepSeek."""
    floats = {
        f"m.experts.{e}.{role}_proj.weight": torch.randn(136 if role != "down" else 72, 72 if role != "down" else 136)
        for e in range(3)
        for role in ("gate", "up", "down")
    }
    tensors = fp8_tensors(floats, lambda name: True)
    real = dequantized(tensors)
    with open_checkpoint(write(tmp_path / "m", tensors)) as checkpoint:
        shape = (6, 136, 72)
        assert checkpoint.own_format("m.experts.gate_up_proj", shape) == "fp8"
        for format in ("fp8", "int4"):
            stack = checkpoint.packed_stack("m.experts.gate_up_proj", format, shape)
            for i, (e, role) in enumerate((e, role) for e in range(3) for role in ("gate", "up")):
                weight = real[f"m.experts.{e}.{role}_proj.weight"]
                want = weight if format == "fp8" else quant.unpack(quant.pack(weight, format))
                assert torch.equal(quant.unpack(stack.matrix(i)), want)


def spoilt(change: Any) -> dict[str, torch.Tensor]:
    tensors = stored()
    change(tensors)
    return tensors


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def put(tensors: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    tensors[name] = tensor


WRONG_HEADERS = {
    "no scale": (lambda t: t.pop(SCALES), A, "scales.*are missing"),
    "no weight": (lambda t: t.pop(A), SCALES, "is the scale of m.a_proj.weight, which is missing"),
    "a scale of a float": (lambda t: put(t, A, FLOATS[A].bfloat16()), SCALES, "which is stored as BF16"),
    "too few scales": (lambda t: put(t, SCALES, t[SCALES][:2].clone()), SCALES, r"\(2, 2\).*shape \(3, 2\)"),
    "turned scales": (lambda t: put(t, SCALES, t[SCALES].T.contiguous()), SCALES, r"\(2, 3\).*shape \(3, 2\)"),
    "flat scales": (lambda t: put(t, SCALES, t[SCALES].flatten()), SCALES, r"\(6,\).*shape \(3, 2\)"),
    "one scale for all": (lambda t: put(t, SCALES, torch.ones(())), SCALES, r"\(\).*shape \(3, 2\)"),
    "scales of 64": (lambda t: put(t, SCALES, torch.ones(5, 3)), SCALES, r"\(5, 3\).*shape \(3, 2\)"),
    "halves": (lambda t: put(t, SCALES, t[SCALES].half()), SCALES, "F16.*F32 or BF16"),
    "a vector": (lambda t: put(t, "m.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)), "m.norm.weight", "only matrices"),
    "three dimensions": (lambda t: put(t, A, t[A][None].clone()), A, "only matrices"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "tensor", "why"), WRONG_HEADERS.values(), ids=WRONG_HEADERS.keys())
def test_inconsistent_headers(tmp_path, change, tensor, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        open_checkpoint(write(tmp_path / "m", spoilt(change)))
    assert caught.value.tensor == tensor and caught.value.file.endswith("model.safetensors")


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_invalid_scales(tmp_path, bad, format):
    def change(tensors):
        tensors[SCALES][2, 1] = bad

    with open_checkpoint(write(tmp_path / "m", spoilt(change))) as checkpoint:
        for read in (lambda: checkpoint.packed(A, format), lambda: checkpoint.read(A)):
            with pytest.raises(CheckpointError, match="contains an invalid scale") as caught:
                read()
            assert caught.value.tensor == SCALES


@pytest.mark.parametrize("format", ["fp8", "int4"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_weights_that_are_nan(tmp_path, format, code):
    def change(tensors):
        tensors[A].view(torch.uint8)[299, 169] = code

    with open_checkpoint(write(tmp_path / "m", spoilt(change))) as checkpoint:
        with pytest.raises(CheckpointError, match="NaN") as caught:
            checkpoint.packed(A, format)
        assert caught.value.tensor == A


@pytest.mark.parametrize(
    "section",
    [{"weight_block_size": [128]}, {"weight_block_size": "128"}, {"weight_block_size": [0, 1]}, {"fmt": "e5m2"}, {"twist": 1}],
)
def test_other_kinds_of_fp8(tmp_path, section):
    (field,) = section
    with pytest.raises(UnsupportedModelError, match=f"config.json: quantization_config.{field} of fp8 is ") as caught:
        open_checkpoint(write(tmp_path / "m", stored(), **section))
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("block", [(64, 64), (16, 130), (256, 128), (1, 128)])
def test_other_blocks(tmp_path, block):
    """Dequantized by their own blocks; exact as fp8 if these consist of blocks of 128 x 128."""
    w = FLOATS[A]
    rows, cols = torch.arange(w.shape[0]) // block[0], torch.arange(w.shape[1]) // block[1]
    scale = torch.rand(int(rows[-1]) + 1, int(cols[-1]) + 1, generator=GENERATOR) + 0.5
    each = scale[rows][:, cols]
    codes = (w / each).to(torch.float8_e4m3fn)
    path = write(tmp_path / "m", {A: codes, SCALES: scale}, weight_block_size=list(block))
    whole = block == (256, 128)
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.read_rows(A, 100, 290), (codes.float() * each)[100:290])
        assert checkpoint.natural_format(A) == ("fp8" if whole else "int8")
        if whole:
            assert torch.equal(quant.unpack(checkpoint.packed(A, "fp8")), codes.float() * each)
