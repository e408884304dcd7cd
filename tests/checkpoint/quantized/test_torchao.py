"""torchao's plain layouts against packers written from its documentation, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.errors import CheckpointError, UnsupportedModelError
from support.quantized_files import Packed, affine, float_quantized, grid, in_order, write_checkpoint

WEIGHT = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * 0.05
SECTION = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}}


def integers(bits: int, size: int, symmetric: bool, zero_points: bool = True) -> Packed:
    """A signed code per byte."""
    group_of = in_order(WEIGHT.shape[1], size)
    codes, scales, zeros = grid(WEIGHT, bits, group_of, symmetric, torch.bfloat16)
    middle = 1 << bits - 1
    tensors = {"qdata": torch.from_numpy((codes - middle).astype(np.int8)), "scale": torch.from_numpy(scales).bfloat16()}
    if zero_points:
        tensors["zero_point"] = torch.from_numpy((zeros - middle).astype(np.int8))
    return tensors, affine(codes, scales, zeros, group_of)


def int4(size: int, dtype: torch.dtype = torch.int8) -> Packed:
    """FBGEMM's rows: scale * code + zero, codes from -8 to 7 in two's complement."""
    groups = WEIGHT.float().unflatten(1, (-1, size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = (x.bfloat16().float() for x in ((high - low) / 15, low + (high - low) / 15 * 8))
    codes = ((groups - zero[..., None]) / scale[..., None]).round().clamp(-8, 7)
    values = (codes * scale[..., None] + zero[..., None]).flatten(1)
    nibbles = codes.flatten(1).to(torch.int16) & 15
    packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8).view(dtype)
    return {"qdata": packed, "scale": scale.T.bfloat16(), "zero_point": zero.T.bfloat16()}, values


def float8(per_row: bool) -> Packed:
    tensors, values = float_quantized(WEIGHT, per_row=per_row)
    return {"qdata": tensors[".weight"], "scale": tensors[".weight_scale"].view(-1, 1)}, values


def written(tmp_path, tensors, kind: str, **data: Any):
    metadata = {
        "m.q.weight": json.dumps({"_type": kind, "_data": data, "_tensor_data_names": list(tensors)}),
        "tensor_names": "[]",
    }
    return write_checkpoint(tmp_path / "m", {f"m.q._weight_{n}": t for n, t in tensors.items()}, SECTION, metadata)


INTX, BITS = "IntxUnpackedToInt8Tensor", {"_type": "torch.dtype", "_data": "int4"}
CASES = {
    "int8": (integers(8, -1, True), "Int8Tensor", {}, "int8", True),
    "int8-groups": (integers(8, 32, True, zero_points=False), "Int8Tensor", {}, "int8", True),
    "int8-asym": (integers(8, 32, False), "Int8Tensor", {}, "int8", False),
    "intx4": (integers(4, 32, True), INTX, {"target_dtype": BITS}, "int4", True),
    "intx4-asym": (integers(4, 32, False), INTX, {"target_dtype": BITS}, "q4_1", False),
    "int4": (int4(32), "Int4Tensor", {}, "q4_1", False),
    "int4-group48": (int4(48, torch.uint8), "Int4Tensor", {}, "q4_1", False),
    "float8-rows": (float8(True), "Float8Tensor", {}, "int8", False),
    "float8-tensor": (float8(False), "Float8Tensor", {}, "fp8", True),
}


@pytest.mark.parametrize(("packed", "kind", "data", "natural", "exact"), CASES.values(), ids=CASES.keys())
def test_dequantized_to_the_bit(tmp_path, packed, kind, data, natural, exact):
    tensors, values = packed
    with open_checkpoint(written(tmp_path, tensors, kind, **data)) as checkpoint:
        assert list(checkpoint.tensors) == ["m.q.weight"] and checkpoint.natural_format("m.q.weight") == natural
        assert torch.equal(checkpoint.read("m.q.weight"), values)
        assert torch.equal(checkpoint.read_rows("m.q.weight", 7, 19), values[7:19])
        ours = quant.unpack(checkpoint.packed("m.q.weight", natural))
        assert not exact or torch.equal(ours, values)


def test_int4_keeps_its_codes(tmp_path):
    tensors, values = int4(32)
    with open_checkpoint(written(tmp_path, tensors, "Int4Tensor")) as checkpoint:
        ours = quant.unpack(checkpoint.packed("m.q.weight", "q4_1"))
        bound = 2.0**-11 * (8 * tensors["scale"].float() + tensors["zero_point"].float().abs()).T.repeat_interleave(32, 1)
        assert bool(((ours - values).abs() <= bound).all()), "only minima are rounded, to float16"
        assert "keeps the codes" in checkpoint.conversions()[0]


def test_what_is_refused(tmp_path):
    tensors, _ = int4(32)
    with pytest.raises(
        UnsupportedModelError, match="Int4TilePackedTo4dTensor.*supported: Int4Tensor.*or use the original model"
    ):
        open_checkpoint(written(tmp_path / "a", tensors, "Int4TilePackedTo4dTensor"))
    with pytest.raises(UnsupportedModelError, match="input is scaled first"):
        open_checkpoint(written(tmp_path / "b", tensors | {"act_pre_scale": torch.ones(96)}, "Int4Tensor"))
    path = write_checkpoint(tmp_path / "c", {"m.q._weight_qdata": tensors["qdata"]}, SECTION)
    with pytest.raises(CheckpointError, match="not described in the metadata") as caught:
        open_checkpoint(path)
    assert caught.value.tensor == "m.q._weight_qdata"
    for name, tensor in (("scale", tensors["scale"][:, :-1]), ("zero_point", tensors["zero_point"][:-1]), ("scale", None)):
        wrong = {n: t.contiguous() for n, t in (tensors | {name: tensor}).items() if t is not None}
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(written(tmp_path / f"d{name}{tensor is None}", wrong, "Int4Tensor"))
        assert caught.value.tensor.startswith("m.q._weight_")
