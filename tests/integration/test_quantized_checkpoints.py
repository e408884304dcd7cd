"""Checkpoints of other quantizers, loaded: the dequantized model's logits in fp32, codes kept by default, and warnings."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.load import pack_checkpoint as pack_module
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support import quantized_files as files
from support.models import CASES, assert_close_rows, random_model
from support.quantized_files import SECTIONS, compressed_section, quantized_copy

IDS = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(1))
BACKENDS = ["reference", *(["cpu"] if unavailable_reason() is None else [])]
ORDERED = SECTIONS["gptq"] | {"desc_act": True}
W4A16 = compressed_section("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
W8A8 = compressed_section("int-quantized", num_bits=8, type="int", strategy="channel")
FP8 = compressed_section("float-quantized", num_bits=8, type="float", strategy="channel")

# Packer and its options, the section of config.json, the default format, the warning, and a bound of the logits' error relative
# to a row's largest: exact codes leave the error of the activations; formats that round again add theirs.
AGAIN, SCALES = "which rounds them again", "which keeps the codes and rounds scales and minima to float16"
METHODS = {
    "gptq": (files.gptq, SECTIONS["gptq"], {}, "int4", None, 0.03),
    "gptq-asym": (files.gptq, SECTIONS["gptq"] | {"sym": False}, {"symmetric": False}, "q4_1",
                  f"GPTQ 4-bit, group 32 to q4_1, {SCALES}", 0.01),
    "gptq-ordered": (files.gptq, ORDERED, {"ordered": True}, "q4_1",
                     f"GPTQ 4-bit, group 32, in activation order to q4_1, {AGAIN}", 0.3),
    "gptq-8bit": (files.gptq, SECTIONS["gptq"] | {"bits": 8, "group_size": -1}, {"bits": 8, "size": -1}, "int8", None, 0.01),
    "awq": (files.awq, SECTIONS["awq"], {}, "q4_1", f"AWQ 4-bit, group 32 to q4_1, {SCALES}", 0.01),
    "w4a16": (files.pack_quantized, W4A16, {}, "int4", None, 0.03),
    "w8a8": (files.int_quantized, W8A8, {}, "int8", None, 0.01),
    "fp8-channel": (files.float_quantized, FP8, {}, "int8", f"FP8 per channel to int8, {AGAIN}", 0.02),
    "fp8-tensor": (files.float_quantized, FP8, {"per_row": False}, "fp8", None, 0.03),
    "nf4": (files.bitsandbytes_4bit, SECTIONS["nf4"], {}, "q4_1", f"bitsandbytes nf4 to q4_1, {AGAIN}", 0.3),
    "bnb-int8": (files.bitsandbytes_int8, SECTIONS["bnb_int8"], {}, "int8", f"bitsandbytes int8 to int8, {SCALES}", 0.01),
}  # fmt: skip


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits[0]


def expected(plain) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_the_dequantized_model(tiny_model, tmp_path, method):
    packer, section, options, format, warning, bound = METHODS[method]
    folder, plain = quantized_copy(tiny_model, tmp_path / "m", packer, section, **options)
    wanted = expected(plain)
    for backend in BACKENDS:
        model = load_model(folder, precision="fp32", backend=backend)
        assert not model.dso.report().warnings
        assert_close_rows(logits(model), wanted)
    loaded = []
    for backend in BACKENDS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded.append(load_model(folder, backend=backend))
        warned = [str(w.message) for w in caught if "converted" in str(w.message)]
        assert warned == ([] if warning is None else [f"14 matrices converted from {warning}"])
        assert loaded[-1].model.layers[1].mlp.down_proj.format == format
        assert_close_rows(logits(loaded[-1]), wanted, bound)
    for (name, a), (_, b) in zip(loaded[0].named_parameters(), loaded[-1].named_parameters(), strict=True):
        assert torch.equal(a, b), f"{name}: the native packer stores the same"


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_another_precision_is_what_the_dequantized_model_gives(tiny_model, tmp_path, precision):
    """Where the codes cannot be kept."""
    folder, plain = quantized_copy(tiny_model, tmp_path / "m", files.bitsandbytes_4bit, SECTIONS["nf4"])
    ours, theirs = (load_model(path, precision=precision) for path in (folder, plain))
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", ["gptq", "w4a16"])
def test_convert(tiny_model, tmp_path, method):
    """Streamed from file to file: the model that `load_model` gives, and nothing of the other quantizer in its config."""
    packer, section, options, format, _, _ = METHODS[method]
    folder, _ = quantized_copy(tiny_model, tmp_path / "m", packer, section, **options)
    pack_checkpoint(folder, tmp_path / "packed", {})
    again, model = load_model(tmp_path / "packed"), load_model(folder)
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    saved = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "deepseek_optimizer"
    assert {entry["format"] for entry in saved["packed_manifest"]["modules"].values()} >= {format}


def test_a_conversion_is_not_resumed_under_another_section(tiny_model, tmp_path, monkeypatch):
    """Files of an interrupted run are reused by a run that reads the weights alike only."""
    folder, _ = quantized_copy(tiny_model, tmp_path / "m", files.gptq, SECTIONS["gptq"])
    real, written = pack_module.write_shard, []

    def interrupted(file, shard, weights):
        if written:
            raise KeyboardInterrupt
        real(file, shard, weights)
        written.extend(name for name in shard.layout.order if "_proj" in name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack_module, "write_shard", interrupted)
        pack_checkpoint(folder, tmp_path / "packed", {}, shard_bytes=1 << 12)
    assert written
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pack_checkpoint(folder, tmp_path / "packed", {}, shard_bytes=1 << 12)
        again, model = load_model(tmp_path / "packed"), load_model(folder)
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_biases_of_zeros_are_left_out(tiny_model, tmp_path):
    """AutoGPTQ writes them for layers without a bias; one that is not zero does not belong to this model."""
    folder, plain = quantized_copy(tiny_model, tmp_path / "m", files.gptq, SECTIONS["gptq"])
    tensors = load_file(folder / "model.safetensors")
    biases = {name.replace(".qweight", ".bias"): t.shape[1] for name, t in tensors.items() if name.endswith(".qweight")}
    tensors |= {name: torch.zeros(size, dtype=torch.float16) for name, size in biases.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_close_rows(logits(load_model(folder, precision="fp32")), expected(plain))
    name = next(iter(biases))
    tensors[name][3] = 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="which the model does not have") as caught:
        load_model(folder)
    assert caught.value.tensor == name


def test_experts_layer_by_layer(tmp_path):
    """Of each expert its own tensors; the stack keeps the codes."""
    config = CASES["deepseek_v3-groups"]()
    config.hidden_size, config.moe_intermediate_size, config.intermediate_size = 96, 64, 64
    random_model(config).save_pretrained(tmp_path / "float")
    folder, plain = quantized_copy(tmp_path / "float", tmp_path / "m", files.pack_quantized, W4A16, size=32)
    ids = torch.randint(0, config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(ids).logits[0]
        assert_close_rows(load_model(folder, precision="fp32")(ids).logits[0], want)
    experts = [m for m in load_model(folder).modules() if hasattr(m, "gate_up_format")]
    assert experts and all(m.gate_up_format == "int4" for m in experts)


def test_from_pretrained_refers_to_load_model(tiny_model, tmp_path):
    """Transformers refuses two kinds of quantization itself; without the section, this package does."""
    folder, _ = quantized_copy(tiny_model, tmp_path / "m", files.gptq, SECTIONS["gptq"])
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with pytest.raises(ConfigError, match="without their scales; use load_model"):
        AutoModelForCausalLM.from_pretrained(folder, config=config, quantization_config=DeepSeekConfig())


@pytest.mark.parametrize("method", ["hqq", "quanto", None, 3])
def test_methods_that_are_not_supported(tiny_model, tmp_path, method):
    folder, _ = quantized_copy(tiny_model, tmp_path / "m", files.gptq, {"quant_method": method})
    with pytest.raises(CheckpointError, match="is quantized by .*, which is not supported .*gptq.*; use the original model"):
        load_model(folder)
