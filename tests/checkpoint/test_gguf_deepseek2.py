"""GGUF's deepseek2: Transformers' config, names and values, for every form and type of the file's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from deepseek_optimizer import quant
from deepseek_optimizer.checkpoint import open_checkpoint, stream_weights
from deepseek_optimizer.errors import CheckpointError, UnsupportedModelError
from support.gguf_deepseek2 import dequantized, v2, v2_lite, v3, write_gguf, youtu
from support.models import random_model

MODELS: dict[str, Callable[..., Any]] = {"v2": v2, "v2_lite": v2_lite, "v3": v3, "youtu": youtu}
MIXED = {"": "Q4_1", "token_embd": "BF16", "attn_k_b": "Q8_0", "attn_v_b": "Q8_0", "ffn_down_exps": "Q8_0", "output": "F16"}
KINDS = {"F32": {"": "F32"}, "Q8_0": {"": "Q8_0"}, "Q4_0": {"": "Q4_0"}, "Q4_1": {"": "Q4_1"}, "mixed": MIXED}


def state_of(model: Any) -> dict[str, torch.Tensor]:
    tied = dict(model.all_tied_weights_keys or {})
    return {name: value for name, value in model.state_dict().items() if name not in tied}


@pytest.fixture(scope="module")
def model() -> Any:
    made = random_model(v3())
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return made


@pytest.mark.parametrize("family", MODELS)
def test_config(tmp_path: Path, family: str) -> None:
    made = random_model(MODELS[family]())
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", made, {"": "F32"}))
    ours = AutoConfig.for_model(**checkpoint.config())
    expected, actual = made.config.to_dict(), ours.to_dict()
    assert type(ours) is type(made.config)
    unsaid = {"architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    rounded = {"rms_norm_eps"}  # float32 in the file
    assert {k: v for k, v in actual.items() if k not in unsaid | rounded} == {
        k: v for k, v in expected.items() if k not in unsaid | rounded
    }
    assert actual["rms_norm_eps"] == pytest.approx(expected["rms_norm_eps"], rel=1e-6)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("forms", [{}, {"whole_kv_b": True}, {"merged_experts": True}], ids=["new", "old", "merged"])
def test_values(tmp_path: Path, model: Any, kinds: str, forms: dict[str, bool]) -> None:
    """Every parameter, including stacks, packed in the format of the file's type, lossless if such a format exists."""
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, KINDS[kinds], **forms))
    expected = state_of(dequantized(model, KINDS[kinds], **forms))
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    for name, (count, rows, cols) in [(n, s) for n, s in shapes.items() if len(s) == 3]:
        shapes[name] = (2 * count, rows // 2, cols) if name.endswith("gate_up_proj") else (count, rows, cols)
    packed = {n for n, s in shapes.items() if len(s) > 1 and not n.endswith("mlp.gate.weight")}
    wanted = {name: checkpoint.own_format(name, shape) if name in packed else None for name, shape in shapes.items()}
    exact = {"F32": {"bf16"}, "Q8_0": {"int8"}, "Q4_0": {"int4"}, "Q4_1": {"q4_1"}, "mixed": {"q4_1", "int8", "bf16"}}[kinds]
    assert set(wanted.values()) <= exact | {None, "bf16"} and set(wanted.values()) >= exact
    for name, value in stream_weights(checkpoint, wanted, shapes):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name
            continue
        matrices = [value.matrix(i) for i in range(value.count)] if isinstance(value, quant.PackedStack) else [value]
        actual = torch.stack([quant.unpack(m) for m in matrices]).reshape(expected[name].shape)
        rounds = value.format == "bf16"
        assert torch.equal(actual, expected[name].bfloat16().float() if rounds else expected[name]), name
    split = 0 if forms.get("whole_kv_b") or kinds == "F32" else 3
    stored = KINDS[kinds].get("attn_k_b", KINDS[kinds][""])
    assert checkpoint.conversions() == (
        [f"3 matrices stored as {stored} converted to bf16, which rounds them again"] if split else []
    )


def test_rows_of_kv_b(tmp_path: Path, model: Any) -> None:
    """Any range of rows equals the same range of the whole, in the file's values or in fp32."""
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, {"": "Q8_0", "attn_v_b": "F16"}))
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    whole = checkpoint.read(name)
    assert torch.equal(whole, dequantized(model, {"": "Q8_0", "attn_v_b": "F16"}).state_dict()[name])
    for begin, end in ((0, 1), (31, 33), (95, 97), (5, 250), (96, 192), (len(whole) - 1, len(whole))):
        assert torch.equal(checkpoint.read_rows(name, begin, end), whole[begin:end])
    assert checkpoint.info(name).dtype == "Q8_0 and F16" and checkpoint.lossless_format(name) is None
    assert torch.equal(quant.unpack(checkpoint.packed(name, "fp32")), whole)
    packed = checkpoint.packed(name, "int8")
    assert torch.equal(packed.data, quant.pack(whole, "int8").data)


def test_gate_and_up_of_different_types(tmp_path: Path, model: Any) -> None:
    kinds = {"": "Q4_0", "ffn_up_exps": "Q8_0"}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, kinds))
    name, shape = "model.layers.1.mlp.experts.gate_up_proj", (16, 64, 96)
    assert checkpoint.own_format(name, shape) == "int8"
    stack = checkpoint.packed_stack(name, "int8", shape)
    expected = dequantized(model, kinds).state_dict()[name].reshape(shape)
    assert torch.equal(quant.unpack(stack.matrix(3)), expected[3])  # an up: unchanged
    assert torch.equal(stack.data[2], quant.pack(expected[2], "int8").data)
    assert checkpoint.conversions() == ["8 matrices stored as Q4_0 converted to int8, which rounds them again"]


def test_both_forms_of_kv_b(tmp_path: Path, model: Any) -> None:
    """Some files have both: the whole one is used, and the halves are not reported as unknown tensors."""

    def edit(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        for i in range(3):
            arrays[f"blk.{i}.attn_k_b.weight"] = np.zeros((96, 32), np.float32)
            arrays[f"blk.{i}.attn_v_b.weight"] = np.zeros((192, 64), np.float32)

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, {"": "Q8_0"}, whole_kv_b=True, edit=edit))
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert checkpoint.lossless_format(name) == "int8" and not [n for n in checkpoint.tensors if "k_b_proj" in n]


def test_older_files(tmp_path: Path) -> None:
    """No gating function, no separate head sizes, no mscale."""
    made = random_model(v2())

    def edit(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        del values["expert_gating_func"], values["rope.scaling.yarn_log_multiplier"]
        values["attention.key_length"] = values.pop("attention.key_length_mla")
        values["attention.value_length"] = values.pop("attention.value_length_mla")
        values["attention.head_count_kv"] = made.config.num_attention_heads

    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", made, {"": "F32"}, whole_kv_b=True, edit=edit)).config()
    assert config["model_type"] == "deepseek_v2"
    assert (config["qk_nope_head_dim"], config["v_head_dim"], config["num_key_value_heads"]) == (32, 64, 3)
    assert "mscale_all_dim" not in config["rope_parameters"] and config["rope_parameters"]["factor"] == 4.0
    path = write_gguf(tmp_path / "3.gguf", random_model(v3()), {"": "F32"}, edit=lambda v, a: v.pop("expert_gating_func"))
    assert open_checkpoint(path).config()["model_type"] == "deepseek_v3"  # it has correction biases
    path = write_gguf(tmp_path / "0.gguf", made, {"": "F32"}, edit=lambda v, a: v.update({"expert_weights_scale": 0.0}))
    assert open_checkpoint(path).config()["routed_scaling_factor"] == 1.0


def test_mtp_layers_are_skipped(tmp_path: Path, model: Any) -> None:
    def edit(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        values |= {"block_count": 4, "nextn_predict_layers": 1}
        arrays["blk.3.attn_norm.weight"] = np.ones(96, np.float32)
        arrays["blk.3.nextn.eh_proj.weight"] = np.ones((96, 192), np.float32)

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, {"": "Q8_0"}, edit=edit))
    assert checkpoint.config()["num_hidden_layers"] == 3
    assert not [name for name in checkpoint.tensors if ".3." in name or "nextn" in name]
    (remark,) = checkpoint.remarks()
    assert "2 tensors for multi-token prediction are left out" in remark


def change(**values: Any) -> Callable[..., None]:
    """Sets metadata, or removes it if None; __ stands for a dot."""

    def edit(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        for key, value in values.items():
            key = key.replace("__", ".")
            if value is None:
                del metadata[key]
            else:
                metadata[key] = value

    return edit


def drop(name: str) -> Callable[..., None]:
    return lambda metadata, arrays: arrays.pop(name)


def reshape(name: str, *shape: int) -> Callable[..., None]:
    return lambda metadata, arrays: arrays.update({name: arrays[name].reshape(shape)})


REFUSED = [
    (change(attention__kv_lora_rank=None), CheckpointError, "deepseek2.attention.kv_lora_rank is missing"),
    (change(attention__q_lora_rank=None), CheckpointError, "deepseek2.attention.q_lora_rank is missing"),
    (change(attention__q_lora_rank="x"), CheckpointError, "q_lora_rank must be an integer"),
    (change(attention__key_length_mla=16), CheckpointError, "key_length_mla is 16, but must exceed .*, 16"),
    (change(rope__dimension_count=None), CheckpointError, "rope.dimension_count is missing"),
    (change(expert_used_count=None), CheckpointError, "expert_used_count is missing"),
    (change(expert_shared_count=0), CheckpointError, "expert_shared_count must be an integer >= 1"),
    (change(expert_gating_func=3), UnsupportedModelError, r"expert_gating_func is 3; 1 \(softmax\) and 2 \(sigmoid\)"),
    (change(expert_gating_func=1), CheckpointError, "exp_probs_b.bias'.*sigmoid gating"),
    (change(expert_weights_norm=1), CheckpointError, "expert_weights_norm must be true or false"),
    (change(expert_weights_scale=-1.0), CheckpointError, "expert_weights_scale must be a positive"),
    (change(attention__temperature_scale=0.1), UnsupportedModelError, "temperature_scale"),
    (change(attention__indexer__top_k=8), UnsupportedModelError, "attention.indexer.top_k: sparse attention"),
    (change(rope__scaling__attn_factor=2.0), UnsupportedModelError, "rope.scaling.attn_factor"),
    (change(nextn_predict_layers=3), CheckpointError, "nextn_predict_layers is 3, but must be less than block_count, 3"),
    (change(architecture="deepseek4"), UnsupportedModelError, "'deepseek4' is not supported.*deepseek2"),
    (drop("blk.1.attn_v_b.weight"), CheckpointError, "k_b_proj.weight.*without model.layers.1.self_attn.v_b_proj"),
    (reshape("blk.1.attn_k_b.weight", 3, 32, 64), CheckpointError, r"blk.1.attn_k_b.weight'.*\(3, 32, 64\).*\(3, 64, 32\)"),
    (reshape("blk.1.attn_v_b.weight", 192, 64), CheckpointError, r"blk.1.attn_v_b.weight'.*\(192, 64\)"),
]


@pytest.mark.parametrize("edit, kind, why", REFUSED)
def test_rejected_files(tmp_path: Path, model: Any, edit: Callable[..., None], kind: type[Exception], why: str) -> None:
    with pytest.raises(kind, match=why):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", model, {"": "Q8_0"}, edit=edit))


def test_normalized_weights_of_softmax_gating_are_rejected(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(v2()), {"": "F32"}, edit=change(expert_weights_norm=True))
    with pytest.raises(UnsupportedModelError, match="expert_weights_norm is true with softmax"):
        open_checkpoint(path)


def test_missing_and_misshapen_experts(tmp_path: Path, model: Any) -> None:
    name, shape = "model.layers.2.mlp.experts.gate_up_proj", (16, 64, 96)
    for edit, why in (
        (drop("blk.2.ffn_up_exps.weight"), "lacks model.layers.2.mlp.experts.up_proj"),
        (reshape("blk.2.ffn_gate_exps.weight", 4, 128, 96), r"has shape \(4, 128, 96\).*\(8, 64, 96\)"),
    ):
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, {"": "Q8_0"}, edit=edit))
        with pytest.raises(CheckpointError, match=why):
            stream_weights(checkpoint, {name: "int8"}, {name: shape}, ignored=(".*",))


def test_config_is_json(tmp_path: Path, model: Any) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, {"": "Q8_0"})).config()
    assert json.loads(json.dumps(config)) == config
