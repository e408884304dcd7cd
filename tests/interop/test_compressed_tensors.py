"""compressed-tensors: what its compressors write is read as what they decompress."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.checkpoint import open_checkpoint
from support.quantized_files import compressed_section, write_checkpoint

pytest.importorskip("compressed_tensors")  # needs Python 3.11

INT4 = {"num_bits": 4, "type": "int"}
INT8 = {"num_bits": 8, "type": "int"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


@pytest.mark.parametrize(
    ("format", "weights"),
    [
        *(
            ("pack-quantized", bits | {"symmetric": symmetric} | groups)
            for bits in (INT4, INT8)
            for symmetric in (True, False)
            for groups in (
                {"strategy": "channel"},
                {"strategy": "group", "group_size": 32},
                {"strategy": "group", "group_size": 128},
            )
        ),
        ("int-quantized", INT8 | {"symmetric": True, "strategy": "channel"}),
        ("int-quantized", INT8 | {"symmetric": False, "strategy": "channel"}),
        ("float-quantized", FP8 | {"strategy": "channel"}),
        ("float-quantized", FP8 | {"strategy": "tensor"}),
        ("float-quantized", FP8 | {"strategy": "block", "block_structure": [128, 128]}),
    ],
)
@pytest.mark.parametrize("shape", [(64, 256), (200, 384)])
def test_read_as_decompressed(tmp_path, format, weights, shape):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    scales = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, cols // weights.get("group_size", 1)),
        "block": (-(-rows // 128), -(-cols // 128)),
    }[weights["strategy"]]
    state = {
        "weight": torch.randn(shape, generator=generator) * 0.05,
        "weight_scale": torch.rand(scales, generator=generator) * 0.01 + 0.001,
    }
    if not weights["symmetric"]:
        limit = 1 << weights["num_bits"] - 1
        state["weight_zero_point"] = torch.randint(-limit, limit, scales, generator=generator, dtype=torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    tensors = {f"m.q_proj.{name}": tensor for name, tensor in stored.items() if tensor is not None}
    with open_checkpoint(write_checkpoint(tmp_path / "m", tensors, compressed_section(format, **weights))) as checkpoint:
        assert torch.equal(checkpoint.read("m.q_proj.weight"), compressor.decompress(stored, scheme)["weight"])
