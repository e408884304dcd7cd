"""Configs and parameters of GGUF files of every architecture: variants of files, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.checkpoint.gguf_architectures import ARCHITECTURES
from deepseek_optimizer.errors import CheckpointError, UnsupportedModelError
from deepseek_optimizer.models import SUPPORTED
from support.gguf_converter import rounded, write_gguf
from support.gguf_families import CASES
from support.models import random_model

Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]
SLIDING, FULL = "sliding_attention", "full_attention"
# llama.cpp has no architecture for them, or one that is not read yet.
WITHOUT_FILES = {"deepseek_v4", "gemma4_unified_text", "ministral"}


def opened(path: Path, name: str, kind: str = "F32", edit: Edit | None = None) -> Any:
    case = CASES[name]
    return open_checkpoint(write_gguf(path / "m.gguf", case, random_model(case.config()), kind, edit=edit))


def change(**values: Any) -> Edit:
    """Sets metadata, or removes it if None; __ stands for a dot."""

    def edit(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        for key, value in values.items():
            metadata.pop(key.replace("__", "."), None)
            if value is not None:
                metadata[key.replace("__", ".")] = value

    return edit


def drop(name: str) -> Edit:
    return lambda metadata, arrays: arrays.pop(name)


def test_every_family_has_an_architecture() -> None:
    built = {entry.model[0] for entries in ARCHITECTURES.values() for entry in entries}
    assert set(SUPPORTED) - built - {"deepseek_v2", "youtu"} == WITHOUT_FILES
    tested = {case.arch for case in CASES.values()} | {"gpt-oss"}  # in tests/integration/test_gpt_oss.py
    assert set(ARCHITECTURES) <= tested


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo3", "qwen3_5_moe", "kimi_linear", "phi3-longrope", "lfm2"])
def test_config_is_json(tmp_path: Path, name: str) -> None:
    config = opened(tmp_path, name).config()
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(
    "name, edit, expected",
    [
        ("gemma2", change(attention__sliding_window=None), {"sliding_window": 4096}),
        ("gemma2", change(final_logit_softcapping=None), {"final_logit_softcapping": 30.0}),
        ("gemma3", change(attention__sliding_window=None), {"layer_types": [FULL] * 7}),
        ("gemma3", change(attention__sliding_window_pattern=1), {"layer_types": [FULL] * 7}),
        ("gemma3", change(attention__sliding_window_pattern=2), {"layer_types": [*[SLIDING, FULL] * 3, SLIDING]}),
        ("gemma3", change(rope__freq_base_swa=None, rope__scaling__type="linear", rope__scaling__factor=8.0), {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        }),
        ("olmo3", change(attention__sliding_window_pattern=None), {"layer_types": [SLIDING] * 3 + [FULL]}),
        ("phi3", change(attention__sliding_window=0), {"sliding_window": None}),
        ("granite", change(attention__scale=None), {"attention_multiplier": 0.25}),
        ("granite", change(residual_scale=None), {"residual_multiplier": 1.0}),
        ("qwen3_next", change(attention__recurrent_layers=[False, True, True, True]), {
            "layer_types": ["full_attention"] + ["linear_attention"] * 3,
        }),
        ("gemma4", change(final_logit_softcapping=None), {"final_logit_softcapping": None, "attention_k_eq_v": True}),
        ("gemma4-shared", change(), {
            "attention_k_eq_v": False, "use_double_wide_mlp": True, "vocab_size_per_layer_input": 224,
            "num_kv_shared_layers": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        }),
        ("lfm2", change(attention__head_count_kv=[2, 0, 2, 0, 2]), {
            "layer_types": ["full_attention", "conv", "full_attention", "conv", "full_attention"],
        }),
        ("qwen2_moe", change(expert_feed_forward_length=None, feed_forward_length=128), {"moe_intermediate_size": 64}),
        ("qwen2_moe", change(expert_shared_feed_forward_length=None, feed_forward_length=96), {
            "shared_expert_intermediate_size": 96,
        }),
        ("mistral3", change(attention__key_length=None), {"head_dim": 32}),
        ("mistral3", change(attention__temperature_scale=0.0), {"model_type": "mistral"}),
        ("glm4_moe_lite", change(tokenizer__ggml__pre="glm4"), {"model_type": "glm4_moe_lite"}),
        ("glm4_moe_lite", change(), {"model_type": "deepseek_v3"}),
        ("llama4", change(), {
            "layer_types": ["chunked_attention"] * 3 + [FULL], "attention_chunk_size": 8192, "attn_temperature_tuning": True,
            "intermediate_size": 64, "intermediate_size_mlp": 160, "use_qk_norm": True,
        }),
        ("llama4", change(expert_count=128), {"use_qk_norm": False}),
        ("mistral4", change(attention__temperature_scale=0.5), {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 64.0, "original_max_position_embeddings": 19,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
            },
        }),
        ("glm_moe_dsa", change(), {"indexer_types": ["full", "full", "shared", "shared"], "index_topk": 16}),
        ("glm_moe_dsa", change(attention__indexer__types=None), {"indexer_types": ["full"] * 4}),
        ("glm_moe_dsa", change(attention__indexer__types=None, context_length=1 << 20), {
            "indexer_types": ["full", "full", "full", "shared"],
        }),
        ("qwen2", change(tokenizer__ggml__eos_token_id=7), {"eos_token_id": 7, "bos_token_id": None, "pad_token_id": None}),
    ],
)  # fmt: skip
def test_metadata(tmp_path: Path, name: str, edit: Edit, expected: dict[str, Any]) -> None:
    config = opened(tmp_path, name, edit=edit).config()
    assert {field: config[field] for field in expected} == expected


def test_sizes_with_their_own_attention_scale(tmp_path: Path) -> None:
    """Gemma 2 27B, recognized by its 46 layers: hidden_size / num_attention_heads instead of head_dim."""

    def edit(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        metadata["block_count"] = 46
        arrays["blk.45.attn_norm.weight"] = arrays["blk.0.attn_norm.weight"]

    assert opened(tmp_path, "gemma2", edit=edit).config()["query_pre_attn_scalar"] == 16
    assert opened(tmp_path, "gemma2").config()["query_pre_attn_scalar"] == 20


@pytest.mark.parametrize("name", ["llama", "glm", "qwen2"])
def test_fused_queries_keys_and_values(tmp_path: Path, name: str) -> None:
    """What `convert_hf_to_gguf.py --fuse-qkv` writes, and older files of ChatGLM."""

    def fuse(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        for layer in range(3):
            for leaf in ("weight", "bias"):
                if f"blk.{layer}.attn_q.{leaf}" in arrays:
                    parts = [arrays.pop(f"blk.{layer}.attn_{part}.{leaf}") for part in "qkv"]
                    arrays[f"blk.{layer}.attn_qkv.{leaf}"] = np.concatenate(parts)

    plain = opened(tmp_path, name)
    expected = {tensor: plain.read(tensor) for tensor in plain.tensors}
    fused = opened(tmp_path, name, edit=fuse)
    assert fused.tensors.keys() == expected.keys() and fused.config() == plain.config()
    for tensor, value in expected.items():
        assert torch.equal(fused.read(tensor), value), tensor


def test_a_fused_projection_of_the_wrong_size(tmp_path: Path) -> None:
    def edit(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        arrays["blk.0.attn_qkv.weight"] = np.zeros((100, 96), np.float32)

    with pytest.raises(CheckpointError, match="attn_qkv.weight': has 100 rows for 10 heads of 16"):
        opened(tmp_path, "qwen2", edit=edit)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "llama", "phi3", "glm4"])
def test_rearranged_matrices_are_packed_without_loss(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = rounded(random_model(case.config()), "Q8_0")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", case, model, "Q8_0"))
    parameters = dict(model.named_parameters())
    packed = 0
    for tensor, info in checkpoint.tensors.items():
        if info.dtype == "Q8_0" and len(info.shape) == 2:
            assert checkpoint.lossless_format(tensor) == "int8"
            assert torch.equal(quant.unpack(checkpoint.packed(tensor, "int8")), parameters[tensor]), tensor
            packed += 1
    assert packed > 10 and checkpoint.conversions() == []


def test_columns_that_cannot_move_undecoded(tmp_path: Path) -> None:
    """With value heads of 16 elements, half a block of Q8_0, the columns of the output projection stay as stored."""
    case = CASES["qwen3_5"]
    config = case.config()
    config.linear_value_head_dim = 16
    model = rounded(random_model(config), "F32")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", case, model, "Q8_0"))
    name = "model.layers.0.linear_attn.out_proj.weight"
    assert checkpoint.lossless_format(name) == checkpoint.natural_format(name) == "int8"
    packed = checkpoint.packed(name, "int8")
    assert packed.order == quant.ColumnOrder(2, 3) and checkpoint.conversions() == []
    assert torch.equal(quant.unpack(packed), checkpoint.read(name))
    assert (checkpoint.read(name) - model.get_parameter(name)).abs().max() < 0.01
    other = checkpoint.packed(name, "bf16")  # from the decoded matrix, in the model's order
    assert other.order is None and torch.equal(quant.unpack(other), checkpoint.read(name).bfloat16().float())


REFUSED = [
    ("mistral3", change(attention__temperature_scale=0.1), UnsupportedModelError, "temperature_scale is supported with .*yarn"),
    ("mistral3", change(rope__scaling__attn_factor=0.5), UnsupportedModelError, "attn_factor is supported with .*yarn"),
    ("gemma4", drop("rope_freqs.weight"), CheckpointError, "rope_freqs.weight': is missing"),
    ("gemma4", lambda metadata, arrays: arrays["rope_freqs.weight"].fill(3.0), CheckpointError, "not Gemma 4's"),
    ("gemma4", change(attention__head_count_kv=[2, 1, 1, 1]), CheckpointError, "head_count_kv must be the same"),
    ("gemma4-shared", change(feed_forward_length=[160] * 4 + [320] * 2), CheckpointError, "must be one width, doubled"),
    ("gemma4-shared", drop("per_layer_token_embd.weight"), CheckpointError, "per_layer_token_embd.weight': is missing"),
    ("granite", change(logit_scale=None), CheckpointError, "granite.logit_scale is missing"),
    ("mixtral", change(expert_used_count=None), CheckpointError, "llama.expert_used_count is missing"),
    ("gemma3", change(attention__sliding_window_pattern=[True]), CheckpointError, "must be .* each of 7 layers"),
    ("lfm2", change(attention__head_count_kv=[1, 2]), CheckpointError, "head_count_kv must be an integer >= 0 for each of 5"),
    ("qwen2", change(attention__head_count_kv=[1, 2]), CheckpointError, "head_count_kv must be an integer"),
    ("qwen3_5", change(ssm__state_size=16), CheckpointError, "cannot be made of blk.0.ssm_conv1d.weight"),
    ("qwen3_5", change(ssm__time_step_rank=5), CheckpointError, "ssm.time_step_rank, 5, must be a multiple of ssm.group_count"),
    ("qwen3_5", change(ssm__state_size=1 << 30), CheckpointError, "at most 1048576 elements"),
    ("qwen3_next", drop("blk.0.attn_gate.weight"), CheckpointError, "is present without .*in_proj_z.weight"),
    ("kimi_linear", drop("blk.0.ssm_conv1d_k.weight"), CheckpointError, "without model.layers.0.self_attn.k_conv1d.weight"),
    ("kimi_linear", drop("blk.1.attn_v_b.weight"), CheckpointError, "without model.layers.1.self_attn.v_b_proj.weight"),
    ("kimi_linear", change(expert_gating_func=1), UnsupportedModelError, "expert_gating_func must be 2"),
    ("glm_moe_dsa", change(expert_gating_func=1), UnsupportedModelError, "must be 2 .sigmoid. with architecture 'glm-dsa'"),
    ("glm_moe_dsa", change(attention__indexer__top_k=None), CheckpointError, "glm-dsa.attention.indexer.top_k is missing"),
    ("mistral4", change(expert_gating_func=2), UnsupportedModelError, "must be 1 .softmax. with architecture 'mistral4'"),
    ("mistral4", change(rope__scaling__type="linear"), UnsupportedModelError, "must be 'yarn' in Mistral 4"),
    ("llama4", change(interleave_moe_layer_step=None), CheckpointError, "llama4.interleave_moe_layer_step is missing"),
    ("llama4", lambda metadata, arrays: arrays["rope_freqs.weight"].fill(3.0), CheckpointError, "not llama3's"),
    ("phi3-longrope", drop("rope_factors_short.weight"), CheckpointError, "rope_factors_short.weight': is missing"),
    ("kimi_linear", change(attention__head_count=6), CheckpointError, "attn_k_b.weight': has shape"),
    ("lfm2", drop("token_embd.weight"), CheckpointError, "'token_embd.weight': is missing"),
]  # fmt: skip


@pytest.mark.parametrize("name, edit, kind, why", REFUSED)
def test_refused_files(tmp_path: Path, name: str, edit: Edit, kind: type[Exception], why: str) -> None:
    with pytest.raises(kind, match=why) as caught:
        opened(tmp_path, name, edit=edit)
    assert str(tmp_path / "m.gguf") in str(caught.value)


def test_unused_keys_and_values_of_gemma4(tmp_path: Path) -> None:
    """Some files have those of layers that read the cache of others."""

    def add(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        for part in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"):
            arrays[f"blk.4.{part}"] = arrays[f"blk.0.{part}"]

    assert opened(tmp_path, "gemma4-shared", edit=add).tensors.keys() == opened(tmp_path, "gemma4-shared").tensors.keys()


def test_rates_that_do_not_decay(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "qwen3_5", edit=lambda metadata, arrays: arrays["blk.0.ssm_a"].fill(1.0))
    with pytest.raises(CheckpointError, match="blk.0.ssm_a'.*rates of decay below 0"):
        checkpoint.read("model.layers.0.linear_attn.A_log")


def test_prediction_layers_are_left_out(tmp_path: Path) -> None:
    def edit(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        metadata |= {"block_count": 4, "nextn_predict_layers": 1}
        arrays["blk.3.attn_norm.weight"] = arrays["blk.2.attn_norm.weight"]

    checkpoint = opened(tmp_path, "glm4_moe", edit=edit)
    assert checkpoint.config()["num_hidden_layers"] == 3 and not [name for name in checkpoint.tensors if ".3." in name]
    assert "1 tensors for multi-token prediction are left out" in checkpoint.remarks()[0]
