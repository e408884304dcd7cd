"""FP8 checkpoints: loaded unchanged at one byte per weight, or in another format; and through `dso convert`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support.fp8_files import dequantized, fp8_copy
from support.models import CASES, assert_close_rows, random_model

IDS = torch.randint(0, 250, (1, 60), generator=torch.Generator().manual_seed(1))
BACKENDS = ["reference", *(["cpu"] if unavailable_reason() is None else [])]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    return fp8_copy(tiny_model, tmp_path_factory.mktemp("fp8") / "m")


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The same model in float32, dequantized."""
    target = tmp_path_factory.mktemp("plain") / "m"
    shutil.copytree(folder, target)
    save_file(dequantized(load_file(folder / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def expected(plain):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(IDS).logits[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_at_one_byte_per_weight(folder, expected, backend):
    model = load_model(folder, backend=backend)
    rows = {row.format: row for row in model.dso.report().formats}
    assert rows["fp8"].matrices == 14 and rows["fp8"].bytes <= 1.07 * rows["fp8"].weights
    assert not model.dso.report().warnings
    with torch.no_grad():
        assert_close_rows(model(IDS).logits[0], expected, 2e-2)


@pytest.mark.parametrize("precision", ["int4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_converted_while_loading(folder, plain, precision, backend):
    """The same bits as when the dequantized model is packed."""
    ours, theirs = (load_model(path, precision=precision, backend=backend) for path in (folder, plain))
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name


def test_formats_of_individual_matrices(folder):
    model = load_model(folder, formats={"model.layers.0.mlp.up_proj": "int4"}, backend="reference")
    assert model.model.layers[0].mlp.up_proj.format == "int4" and model.model.layers[1].mlp.up_proj.format == "fp8"


def test_a_float_model_packed_as_fp8(plain, expected):
    with torch.no_grad():
        assert_close_rows(load_model(plain, precision="fp8").eval()(IDS).logits[0], expected, 0.1)
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=DeepSeekConfig(precision="fp8"))
    for a, b in zip(packed.parameters(), load_model(plain, precision="fp8").parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
def test_convert(folder, tmp_path, precision):
    """Converted from file to file, saved by the model, and mapped again: the same model."""
    pack_checkpoint(folder, tmp_path / "packed", {"precision": precision})
    model = load_model(folder, precision=precision)
    model.save_pretrained(tmp_path / "saved")
    for path in ("packed", "saved"):
        again = load_model(tmp_path / path)
        for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(a, b), (path, name)
        saved = json.loads((tmp_path / path / "config.json").read_text())
        assert saved["quantization_config"]["quant_method"] == "deepseek_optimizer"
        formats = {entry["format"] for entry in saved["packed_manifest"]["modules"].values()}
        assert formats == ({"fp8", "fp32"} if precision == "auto" else {precision})
        with open_checkpoint(tmp_path / path) as checkpoint:
            assert checkpoint.kind == "packed" and not [name for name in checkpoint.tensors if "scale" in name]


def test_transformers_loader_names_the_remedy(folder):
    """With the section, Transformers rejects two kinds of quantization; without it, it would read codes without scales."""
    with pytest.raises(ValueError, match="quantized with"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=DeepSeekConfig())
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with pytest.raises(ConfigError, match="without their scales; use load_model"):
        AutoModelForCausalLM.from_pretrained(folder, config=config, quantization_config=DeepSeekConfig())


@pytest.mark.parametrize("precision", ["auto", "int4"])
def test_a_scale_of_the_wrong_shape_is_an_error_before_reading(folder, tmp_path, precision):
    path = shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    tensors[name] = torch.ones(2, 2)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\(2, 2\)") as caught:
        load_model(path, precision=precision)
    assert caught.value.tensor == name


@pytest.mark.parametrize("backend", BACKENDS)
def test_latent_attention(tmp_path, backend):
    """kv_b in FP8: in the absorbed form, other matrices are derived from it."""
    config = CASES["deepseek_v3-groups"]()
    config.first_k_dense_replace = config.num_hidden_layers
    random_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    folder = fp8_copy(tmp_path / "float", tmp_path / "fp8")
    save_file(dequantized(load_file(folder / "model.safetensors")), tmp_path / "float" / "model.safetensors", {"format": "pt"})
    ids = torch.randint(0, config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(2))
    model = load_model(folder, backend=backend)
    assert model.model.layers[2].self_attn.kv_b_proj.format == "fp8"
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)(ids).logits[0]
        assert_close_rows(model(ids).logits[0], expected, 3e-2)
        alone = [model(ids[:, :1], use_cache=True)]
        for token in ids[0, 1:]:
            alone.append(model(token.view(1, 1), past_key_values=alone[-1].past_key_values, use_cache=True))
    assert_close_rows(torch.cat([step.logits[0] for step in alone]), expected, 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deepseek_v3(tmp_path, backend):
    """Experts tensor by tensor, latent attention with kv_b in FP8; the router, its bias and the norms unchanged."""
    config = CASES["deepseek_v3-groups"]()
    random_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    folder = fp8_copy(tmp_path / "float", tmp_path / "fp8")
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.2.mlp.experts.1.up_proj.weight"].dtype == torch.float8_e4m3fn
    save_file(dequantized(stored), tmp_path / "float" / "model.safetensors", {"format": "pt"})
    ids = torch.randint(0, config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(2))
    model = load_model(folder, backend=backend)
    formats = {row.format: row.matrices for row in model.dso.report().formats}
    assert formats.keys() == {"fp8", "bf16"} and model.model.layers[2].self_attn.kv_b_proj.format == "fp8"
    with torch.no_grad():  # in fp32: with rounded activations a router may choose another expert
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)(ids).logits[0]
        assert_close_rows(load_model(folder, precision="fp32", backend=backend)(ids).logits[0], expected)
        difference = (model(ids).logits[0] - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert difference.median() < 2e-2, "most rows have the same experts"
    pack_checkpoint(folder, tmp_path / "packed", {})
    again = load_model(tmp_path / "packed", backend=backend)
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
