"""DeepSeek-V4's checkpoints: published names, FP8 matrices with scales that are powers of two, FP4 experts, MTP layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer import CheckpointError, load_model
from deepseek_optimizer.checkpoint import open_checkpoint
from support.family_configs import deepseek_v4
from support.models import assert_close_rows, random_ids, transformers_logits
from support.mtp_files import save_with_mtp

_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32}


def published(path: Path, **fields: Any) -> Any:
    return save_with_mtp(path, deepseek_v4(**SIZES, **fields))


def test_published_names_are_read(tmp_path: Path) -> None:
    model = published(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("attn.compressor.ape") for name in names) and any("hc_ffn_fn" in name for name in names)
    with open_checkpoint(tmp_path) as checkpoint:
        for name, value in model.state_dict().items():
            if ".experts." not in name:
                assert torch.equal(checkpoint.read(name), value), name
    ids = random_ids(model.config, 40)
    loaded = load_model(tmp_path, precision="fp32", backend="reference")
    with torch.no_grad():
        assert_close_rows(loaded(torch.tensor([ids]), use_cache=False).logits[0], transformers_logits(model, ids))


def quantize(path: Path, **section: Any) -> dict[str, torch.Tensor]:
    """Stores experts as FP4, and q_b_proj and the projections of an MTP layer's inputs as FP8; returns the values of what was
    quantized, by published name."""
    tensors, values = load_file(path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    fp8 = ("attn.wq_b.weight", "e_proj.weight", "h_proj.weight")
    for name in [name for name in tensors if ".experts." in name or name.endswith(fp8)]:
        rows, cols = tensors.pop(name).shape
        if ".experts." in name:
            codes = torch.randint(0, 16, (rows, cols), generator=generator, dtype=torch.uint8)
            exponents = torch.randint(120, 126, (rows, cols // 32), generator=generator, dtype=torch.uint8)
            tensors[name] = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
            scale = (exponents.float() - 127).exp2().repeat_interleave(32, 1)
            values[name] = _VALUES[codes.long()] * scale
        else:
            exponents = torch.randint(118, 122, (-(-rows // 128), -(-cols // 128)), generator=generator, dtype=torch.uint8)
            numbers = torch.randn(rows, cols, generator=generator).to(torch.float8_e4m3fn)
            tensors[name] = numbers
            scale = (exponents.float() - 127).exp2().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
            values[name] = numbers.float() * scale
        tensors[name.removesuffix("weight") + "scale"] = exponents.view(torch.float8_e8m0fnu)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
        "activation_scheme": "dynamic", **section,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps({**config, "expert_dtype": "fp4"}))
    return values


def test_fp4_and_fp8_codes_are_kept(tmp_path: Path) -> None:
    model = published(tmp_path)
    values = quantize(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        for name, value in values.items():
            roles = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
            own = name.replace("mtp.0.", "layers.4.")
            own = own if own.startswith("model.") else f"model.{own}"
            own = own.replace(".attn.wq_b.", ".self_attn.q_b_proj.").replace(".ffn.", ".mlp.")
            for short, role in roles.items():
                own = own.replace(f".{short}.", f".{role}.")
            assert torch.equal(checkpoint.read(own), value)
            assert checkpoint.natural_format(own) == ("mxfp4" if ".experts." in own else "fp8")
    with torch.no_grad():
        for name, value in values.items():
            if name.startswith("mtp."):
                continue
            layer = model.model.layers[int(name.partition("layers.")[2].partition(".")[0])]
            if name.endswith("wq_b.weight"):
                layer.self_attn.q_b_proj.weight.copy_(value)
                continue
            expert, _, role = name.partition("experts.")[2].removesuffix(".weight").partition(".")
            into = layer.mlp.experts.down_proj if role == "w2" else layer.mlp.experts.gate_up_proj
            rows = {"w1": slice(0, 32), "w3": slice(32, 64), "w2": slice(None)}[role]
            into[int(expert)][rows].copy_(value)
    ids = random_ids(model.config, 40)
    loaded = load_model(tmp_path, backend="reference", formats={"lm_head": "fp32"})
    experts = loaded.model.layers[0].mlp.experts
    assert (experts.gate_up_format, experts.down_format) == ("mxfp4", "mxfp4")
    assert loaded.model.layers[0].self_attn.q_b_proj.format == "fp8"
    layers, mtp = list(loaded.model.layers), loaded.model.layers[loaded.config.num_hidden_layers]  # iteration ends before it
    assert (mtp.e_proj.format, mtp.h_proj.format, mtp.mlp.experts.down_format) == ("fp8", "fp8", "mxfp4")
    down = [values[f"mtp.0.ffn.experts.{e}.w2.weight"] for e in range(model.config.n_routed_experts)]
    assert torch.equal(mtp.mlp.experts.dequantized()[1], torch.stack(down))
    for own, packed in zip(model.model.layers, layers, strict=True):
        held = (own.mlp.experts.gate_up_proj, own.mlp.experts.down_proj)
        assert all(torch.equal(a, b) for a, b in zip(held, packed.mlp.experts.dequantized(), strict=True))
    with torch.no_grad():  # products with these formats round their inputs
        assert_close_rows(loaded(torch.tensor([ids]), use_cache=False).logits[0], transformers_logits(model, ids), 0.05)


@pytest.mark.parametrize("damage, message", [("scale", "scale_inv, which is missing"), ("nan", "scale that is NaN")])
def test_damaged_fp4_is_named(tmp_path: Path, damage: str, message: str) -> None:
    published(tmp_path)
    quantize(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.0.w1.scale"))
    if damage == "nan":
        tensors[name].view(torch.uint8)[3] = 255
    else:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, backend="reference")
