"""GGUF files as checkpoints: names, config and values equal those that Transformers loads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

import deepseek_optimizer
from deepseek_optimizer import quant
from deepseek_optimizer.checkpoint import check_tokenizer_size, open_checkpoint
from deepseek_optimizer.errors import CheckpointError, UnsupportedModelError
from support.checkpoint_files import (
    ARRAY,
    BOOL,
    F32,
    HIDDEN,
    STRING,
    U32,
    VOCAB,
    gguf_bytes,
    gguf_tensor,
    model_tensors,
    model_values,
)  # fmt: skip
from support.gguf_kquants import llama_file

ARCHITECTURES = ["llama", "qwen2", "qwen3"]


def save(path: Path, values: dict, tensors: list) -> Path:
    path.write_bytes(gguf_bytes(values, tensors))
    return path


def test_recommended_sampling(tmp_path: Path) -> None:
    """The keys that llama.cpp's converter writes from a generation config; other values than numbers in range are left out."""
    given = {
        "temp": (F32, 0.6), "top_k": (U32, 20), "top_p": (F32, 1.5), "min_p": (STRING, "x"), "penalty_repeat": (F32, 1.05),
        "mirostat": (U32, 1),
    }  # fmt: skip
    values = model_values("llama", 1) | {f"general.sampling.{key}": value for key, value in given.items()}
    path = save(tmp_path / "m.gguf", values, model_tensors("llama", 1, "Q8_0", tied=True))
    expected = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    assert open_checkpoint(path).sampling == expected
    config = deepseek_optimizer.load_model(path).generation_config
    assert {name: getattr(config, name) for name in expected} == expected and config.do_sample
    del values["general.sampling.temp"], values["general.sampling.top_k"]
    config = deepseek_optimizer.load_model(save(path, values, model_tensors("llama", 1, "Q8_0", tied=True))).generation_config
    assert config.repetition_penalty == 1.05 and not config.do_sample


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_equals_transformers(tmp_path: Path, architecture: str, tied: bool) -> None:
    values, tensors = model_values(architecture, 2), model_tensors(architecture, 2, "Q8_0", tied)
    path = save(tmp_path / "m.gguf", values, tensors)
    checkpoint = open_checkpoint(path)
    ours = AutoConfig.for_model(**checkpoint.config())
    theirs = AutoModelForCausalLM.from_config(ours)
    expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {name: checkpoint.shape(name) for name in checkpoint.tensors} == expected
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", quantization_config=GgufConfig(gguf_file="m.gguf", dequantize=True), dtype=torch.float32
    )
    for name, parameter in theirs.named_parameters():
        assert torch.equal(checkpoint.read(name), parameter), name
    for field in (
        "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size",
        "bos_token_id", "eos_token_id",
    ):  # fmt: skip
        assert getattr(ours, field) == getattr(theirs.config, field), field


@pytest.mark.parametrize(
    "kind, format",
    [
        ("Q4_0", "int4"),
        ("Q4_1", "q4_1"),
        ("Q8_0", "int8"),
        ("Q5_0", "q5_0"),
        ("Q5_1", "q5_1"),
        ("MXFP4", "mxfp4"),
        ("BF16", "bf16"),
        ("F32", "fp32"),
        ("F16", "fp32"),
    ],
)
def test_lossless_formats(tmp_path: Path, kind: str, format: str) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m.gguf", model_values(), model_tensors(kind=kind)))
    for name in checkpoint.tensors:
        if len(checkpoint.shape(name)) == 2:
            assert checkpoint.lossless_format(name) == format
            assert torch.equal(quant.unpack(checkpoint.packed(name, format)), checkpoint.read(name).float()), name
    assert checkpoint.conversions() == []
    assert checkpoint.natural_format("lm_head.weight") == ("bf16" if kind in ("F16", "F32") else format)


def test_rows_of_heads_are_permuted_for_any_panel(tmp_path: Path) -> None:
    """llama's q and k: any range of rows equals the same range of the whole."""
    checkpoint = open_checkpoint(save(tmp_path / "m.gguf", model_values(), model_tensors(kind="Q4_0")))
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        whole = checkpoint.read(name)
        for begin, end in ((0, 1), (3, 20), (15, 17), (16, len(whole)), (len(whole) - 1, len(whole))):
            assert torch.equal(checkpoint.read_rows(name, begin, end), whole[begin:end])


def test_biases_of_llama_are_permuted_too(tmp_path: Path) -> None:
    bias = torch.arange(64.0)
    tensors = [*model_tensors(), gguf_tensor("blk.0.attn_q.bias", bias), gguf_tensor("blk.0.attn_v.bias", torch.arange(32.0))]
    checkpoint = open_checkpoint(save(tmp_path / "m.gguf", model_values(), tensors))
    got = checkpoint.read("model.layers.0.self_attn.q_proj.bias")
    assert got.tolist() == bias.view(4, 8, 2).transpose(1, 2).flatten().tolist()
    assert checkpoint.read("model.layers.0.self_attn.v_proj.bias").tolist() == list(range(32))
    assert checkpoint.config()["attention_bias"] is True


def test_other_types_are_converted_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(llama_file({"": "Q4_K", "output": "IQ3_S", "token_embd": "IQ3_S"}))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert checkpoint.lossless_format(name) is None and checkpoint.natural_format(name) == "q4_1"
        packed = checkpoint.packed(name, "q4_1")
        error = (quant.unpack(packed) - checkpoint.read(name)).abs()
        assert (error <= quant.get_format("q4_1").error_bound(checkpoint.read(name))).all()
    assert checkpoint.conversions() == ["2 matrices stored as IQ3_S converted to q4_1, which rounds them again"]


def test_a_ggml_type_in_another_format(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m.gguf", model_values(), model_tensors(kind="Q8_0")))
    packed = checkpoint.packed("lm_head.weight", "int4")
    assert torch.equal(packed.data, quant.pack(checkpoint.read("lm_head.weight"), "int4").data)
    assert len(checkpoint.conversions()) == 1


@pytest.mark.parametrize("kind", ["Q4_0", "F32"])
def test_nan_weights(tmp_path: Path, kind: str) -> None:
    tensors = model_tensors(kind=kind)
    i = next(i for i, t in enumerate(tensors) if t[0] == "blk.0.ffn_up.weight")
    name, code, dims, data = tensors[i]
    nan = torch.tensor([math.nan], dtype=torch.float16 if kind == "Q4_0" else torch.float32).view(torch.uint8).numpy().tobytes()
    tensors[i] = name, code, dims, nan + data[len(nan) :]
    checkpoint = open_checkpoint(save(tmp_path / "m.gguf", model_values(), tensors))
    with pytest.raises(CheckpointError, match="NaN") as caught:
        checkpoint.packed("model.layers.0.mlp.up_proj.weight", "int4" if kind == "Q4_0" else "fp32")
    assert caught.value.tensor == "model.layers.0.mlp.up_proj.weight"


# ---- metadata

BROKEN = [
    ({"llama.block_count": (U32, 0)}, "block_count must be"),
    ({"llama.block_count": (U32, 10**9)}, "no block 999999999"),
    ({"llama.block_count": None}, "block_count is missing"),
    ({"llama.block_count": (STRING, "1")}, "block_count must be"),
    ({"llama.block_count": (BOOL, 1)}, "block_count must be"),
    ({"llama.attention.head_count": (U32, 0)}, "head_count must be"),
    ({"llama.attention.head_count": (ARRAY, (U32, [4]))}, "head_count must be"),
    ({"llama.attention.layer_norm_rms_epsilon": (F32, math.nan)}, "epsilon must be"),
    ({"llama.attention.layer_norm_rms_epsilon": (F32, -1.0)}, "epsilon must be"),
    ({"llama.rope.freq_base": (F32, math.inf)}, "freq_base must be"),
    ({"llama.rope.scaling.type": (STRING, "odd")}, "'none', 'linear' and 'yarn'"),
    ({"llama.rope.scaling.type": (STRING, "linear")}, "factor is missing"),
    ({"general.architecture": (U32, 3)}, "architecture must be a string"),
    ({"general.architecture": None}, "architecture is missing"),
    ({"tokenizer.ggml.bos_token_id": (F32, 1.0)}, "bos_token_id must be"),
]


@pytest.mark.parametrize("change, why", BROKEN)
def test_broken_metadata(tmp_path: Path, change: dict, why: str) -> None:
    values = {k: v for k, v in (model_values() | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(save(tmp_path / "m.gguf", values, model_tensors()))


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    values = model_values() | {"llama.attention.head_count": (U32, 3)}
    with pytest.raises(CheckpointError, match="64 rows for 3 heads"):
        open_checkpoint(save(tmp_path / "m.gguf", values, model_tensors())).read("model.layers.0.self_attn.q_proj.weight")


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'falcon'.*llama, .*qwen2, .*qwen3"):
        open_checkpoint(save(tmp_path / "m.gguf", model_values("falcon"), model_tensors()))


def test_two_tensors_for_one_parameter(tmp_path: Path) -> None:
    tensors = [*model_tensors(), gguf_tensor("model.norm.weight", torch.ones(HIDDEN))]
    with pytest.raises(CheckpointError, match="one parameter"):
        open_checkpoint(save(tmp_path / "m.gguf", model_values(), tensors))


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"type": (STRING, "linear"), "factor": (F32, 4.0)}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": (STRING, "yarn"), "factor": (F32, 4.0), "original_context_length": (U32, 32), "attn_factor": (F32, 0.5)},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 0.5 * (0.1 * math.log(4.0) + 1.0),
            },
        ),
        (
            {"type": (STRING, "yarn"), "factor": (F32, 4.0), "original_context_length": (U32, 32)},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        ({"type": (STRING, "none")}, {"rope_type": "default"}),
    ],
)
def test_rope_scaling(tmp_path: Path, values: dict, expected: dict) -> None:
    more = {f"llama__rope__scaling__{k}": v for k, v in values.items()}
    config = open_checkpoint(save(tmp_path / "m.gguf", model_values(**more), model_tensors())).config()
    assert config["rope_parameters"] == {"rope_theta": 10000.0} | expected


def llama3_factors(factor: float) -> torch.Tensor:
    """The factors as written by convert_hf_to_gguf.py."""
    factors = []
    for i in range(8):
        wavelength = 2 * math.pi * 500000.0 ** (i / 8)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


def test_llama3_rope(tmp_path: Path) -> None:
    """The tensor of factors becomes llama3's parameters; the tensor itself is not a parameter."""
    values = model_values(llama__rope__freq_base=(F32, 500000.0))
    tensors = [*model_tensors(), gguf_tensor("rope_freqs.weight", llama3_factors(8.0))]
    checkpoint = open_checkpoint(save(tmp_path / "m.gguf", values, tensors))
    assert "rope_freqs.weight" not in checkpoint.tensors
    rope = checkpoint.config()["rope_parameters"]
    assert rope["rope_type"] == "llama3" and rope["factor"] == 8.0 and rope["original_max_position_embeddings"] == 8192
    tensors[-1] = gguf_tensor("rope_freqs.weight", torch.linspace(1, 8, 8))
    with pytest.raises(CheckpointError, match="not llama3"):
        open_checkpoint(save(tmp_path / "m.gguf", values, tensors))


def test_vocabulary(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m.gguf", model_values(), model_tensors()))
    assert checkpoint.vocabulary_size == VOCAB
    check_tokenizer_size(VOCAB, checkpoint.config()["vocab_size"], checkpoint.path)
    with pytest.raises(CheckpointError, match="41 tokens.*only 40 rows"):
        check_tokenizer_size(VOCAB + 1, checkpoint.config()["vocab_size"], checkpoint.path)
