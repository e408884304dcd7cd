"""Qwen3.5 in K-quants: the output projection of its delta nets, whose columns GGUF files have in another order, in runs shorter
than a superblock. It keeps its blocks, and everything else is as in Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from deepseek_optimizer.quant import ColumnOrder, unpack
from support import models as m
from support.gguf_converter import rounded, write_gguf
from support.gguf_families import CASES
from support.gguf_kquants import random_blocks
from support.lora import adapted, save_adapter
from support.models import assert_close_rows, random_ids, random_model, transformers_logits

NATIVE = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 224, "head_dim": 64}
KEYS, SIZE = 2, 128  # key heads, and elements of a value head: half a superblock
OUT = "linear_attn.out_proj"


def make(path: Path, kind: str, each: int = 2) -> tuple[Any, Path]:
    """Transformers' model and a file of it, with `each` value heads to a key head."""
    config = m.qwen3_5_text(
        **WIDE, linear_num_key_heads=KEYS, linear_num_value_heads=KEYS * each, linear_key_head_dim=32,
        linear_value_head_dim=SIZE,
    )  # fmt: skip
    model = rounded(random_model(config), "Q8_0")
    blocks, generator = {}, torch.Generator().manual_seed(5)
    for i, layer in enumerate(model.model.layers):
        if config.layer_types[i] == "linear_attention":
            rows = random_blocks((256, KEYS * each * SIZE), kind, generator)
            blocks[f"blk.{i}.ssm_out.weight"] = kind, rows
            values = quants.dequantize(rows, GGMLQuantizationType[kind]).reshape(256, each, KEYS, SIZE)
            layer.linear_attn.out_proj.weight.data = torch.from_numpy(np.ascontiguousarray(values.swapaxes(1, 2))).flatten(1)
    assert len(blocks) > 1
    return model, write_gguf(path / "m.gguf", CASES["qwen3_5"], model, "Q8_0", blocks=blocks)


def out_projections(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith(OUT)}


@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@torch.no_grad()
def test_blocks_are_kept(tmp_path: Path, kind: str, each: int) -> None:
    """The same numbers as gguf-py's, in Transformers' order, and its logits."""
    plain, file = make(tmp_path, kind, each)
    with open_checkpoint(file) as checkpoint:
        name = f"model.layers.0.{OUT}.weight"
        packed = checkpoint.packed(name, kind.lower())
        assert packed.order == ColumnOrder(KEYS, each) and torch.equal(unpack(packed), plain.get_parameter(name))
        assert torch.equal(checkpoint.read(name), plain.get_parameter(name))
    model = load_model(file, backend="reference", kv_cache="fp32")
    for name, module in out_projections(model).items():
        assert module.format == kind.lower() and torch.equal(module.dequantized(), plain.get_submodule(name).weight)
    assert kind.lower() in str(model.report()) and not model.report().warnings
    ids = random_ids(plain.config, 60)
    assert_close_rows(model(torch.tensor([ids])).logits[0], transformers_logits(plain, ids), 1e-4)


@NATIVE
@pytest.mark.parametrize("each", [2, 3])
@torch.no_grad()
def test_native_products(tmp_path: Path, each: int) -> None:
    """A prompt and steps of one token, within the error of kernels and of 8-bit activations."""
    plain, file = make(tmp_path, "Q4_K", each)
    ids = torch.tensor([random_ids(plain.config, 40)])
    expected = plain(ids).logits
    for activation, tolerance in ("int16", 5e-4), ("auto", 6e-2):
        model = load_model(file, backend="cpu", kv_cache="fp32", activation=activation)
        past = model(ids[:, :30], use_cache=True).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=past, use_cache=True).logits for i in range(30, 40)]
        assert_close_rows(torch.cat([model(ids[:, :30]).logits, *steps], 1), expected, tolerance)


@torch.no_grad()
def test_saved_and_converted(tmp_path: Path) -> None:
    plain, file = make(tmp_path, "Q6_K")
    ids = torch.tensor([random_ids(plain.config, 20)])
    model = load_model(file, backend="reference")
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    pack_checkpoint(file, tmp_path / "converted", {"backend": "reference"}, tell=lambda message: None)
    pack_checkpoint(tmp_path / "saved", tmp_path / "again", {"backend": "reference"}, tell=lambda message: None)
    for folder in ("saved", "converted", "again"):
        assert torch.equal(load_model(tmp_path / folder, backend="reference")(ids).logits, expected)
        loaded = type(plain).from_pretrained(tmp_path / folder)  # by Transformers' loader
        for name, module in out_projections(loaded).items():
            assert torch.equal(module.dequantized(), plain.get_submodule(name).weight)
    other = load_model(file, backend="reference", precision="int8")
    for name, module in out_projections(other).items():
        assert module.order is None
        assert_close_rows(module.dequantized(), plain.get_submodule(name).weight, 0.01)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=NATIVE)])
def test_adapters(tmp_path: Path, backend: str) -> None:
    """PEFT's layers around these projections: in the plan, in the modules' own forward, its gradients, and merged."""
    peft = pytest.importorskip("peft")
    plain, file = make(tmp_path, "Q6_K")
    folder = save_adapter(plain, tmp_path / "a", targets=["out_proj", "in_proj_qkv"])
    exact = {"activation": "int16"} if backend == "cpu" else {}
    fast = load_model(file, backend=backend, kv_cache="fp32", **exact)
    ids = torch.tensor([random_ids(plain.config, 20)])
    with torch.no_grad():
        expected = adapted(plain, folder)(input_ids=ids).logits
        before = fast(ids).logits
        loaded = peft.PeftModel.from_pretrained(fast, folder, is_trainable=True)
        assert_close_rows(loaded(input_ids=ids).logits, expected, 5e-4)
        assert (before - expected).abs().max() > 0.01 * expected.abs().max()
    layer = next(iter(out_projections(fast).values()))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2), requires_grad=True)
    layer(x).sum().backward()
    whole = (layer.base_layer.dequantized() + layer.get_delta_weight("default")).detach()
    torch.testing.assert_close(x.grad, whole.sum(0).expand(3, -1), rtol=1e-3, atol=1e-4)
    with pytest.warns(UserWarning, match="rounds the sum again"):
        merged = loaded.merge_and_unload()
    packed = next(iter(out_projections(merged).values()))
    assert packed.order is not None
    assert_close_rows(packed.dequantized(), whole, 0.04)  # half a step of a 6-bit code


@pytest.mark.parametrize("how", ["load_model", "from_pretrained"])
def test_an_order_of_an_embedding_is_refused(tmp_path: Path, how: str) -> None:
    """Rows of a table are read as they are stored."""
    plain = random_model(m.qwen3_5_text())
    plain.save_pretrained(tmp_path / "float")
    load_model(tmp_path / "float", backend="reference").save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["packed_manifest"]["modules"]["model.embed_tokens"]["column_order"] = [2, 2]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="model.embed_tokens has a column_order"):
        load_model(tmp_path / "packed") if how == "load_model" else type(plain).from_pretrained(tmp_path / "packed")
