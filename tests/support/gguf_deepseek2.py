"""GGUF files of small DeepSeek-V2 and V3 models, written with llama.cpp's package in the layout of its converter.

model = random_model(v3())
write_gguf(path, model, {"": "Q8_0", "ffn_down_exps": "Q4_0"})
expected = dequantized(path, model)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from transformers import DeepseekV2Config, DeepseekV3Config, PreTrainedModel, YoutuConfig

# Rows are multiples of 32 elements, so that any type can store them; the vocabulary is not a multiple of a tile.
_SIZES = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 64, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707,
    }
}  # fmt: skip
_TOP = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp", "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip

Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def v2(**fields: Any) -> DeepseekV2Config:
    return DeepseekV2Config(
        **{**_SIZES, **_YARN, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0, **fields}
    )


def v2_lite(**fields: Any) -> DeepseekV2Config:
    lite = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0}
    return v2(**{**lite, **fields})


def v3(**fields: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**{**_SIZES, **_YARN, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.5, **fields})


def youtu(**fields: Any) -> YoutuConfig:
    moe = ("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace",
           "n_group", "topk_group")  # fmt: skip
    return YoutuConfig(**{k: v for k, v in {**_SIZES, "tie_word_embeddings": True, **fields}.items() if k not in moe})


def metadata(config: Any) -> dict[str, Any]:
    """The converter's metadata by key without the architecture; values are Python objects, floats stand for float32."""
    rope = config.rope_parameters
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    if config.q_lora_rank is not None:
        values["attention.q_lora_rank"] = config.q_lora_rank
    if rope["rope_type"] == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
            "rope.scaling.yarn_beta_fast": rope["beta_fast"],
            "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        }
    if config.model_type == "youtu":
        return values | {"leading_dense_block_count": config.num_hidden_layers, "expert_shared_count": 0}
    return values | {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        **({"expert_weights_norm": True} if config.model_type == "deepseek_v3" and config.norm_topk_prob else {}),
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
    }


def tensors(model: PreTrainedModel, whole_kv_b: bool = False, merged_experts: bool = False) -> dict[str, np.ndarray]:
    """The model's tensors under the converter's names, float32.

    Args:
        whole_kv_b: `attn_kv_b`, as in older files. merged_experts: `ffn_gate_up_exps`, as in some newer ones.
    """
    config, result = model.config, {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name in _TOP:
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                result[f"{_TOP[name]}.weight"] = array
            continue
        _, _, layer, *path, leaf = name.split(".")
        block, part = f"blk.{layer}.", ".".join(path)
        if leaf == "e_score_correction_bias":
            result[f"{block}exp_probs_b.bias"] = array
        elif leaf == "gate_up_proj":
            if merged_experts:
                result[f"{block}ffn_gate_up_exps.weight"] = array
            else:
                result[f"{block}ffn_gate_exps.weight"], result[f"{block}ffn_up_exps.weight"] = np.split(array, 2, 1)
        elif leaf == "down_proj":
            result[f"{block}ffn_down_exps.weight"] = array
        elif part == "self_attn.kv_b_proj" and not whole_kv_b:
            kv_b = array.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            result[f"{block}attn_k_b.weight"] = kv_b[:, : config.qk_nope_head_dim].transpose(0, 2, 1)
            result[f"{block}attn_v_b.weight"] = kv_b[:, config.qk_nope_head_dim :]
        elif part == "self_attn.kv_b_proj":
            result[f"{block}attn_kv_b.weight"] = array
        else:
            result[f"{block}{LAYER[part]}.{leaf}"] = array
    return result


def kind_of(name: str, kinds: Mapping[str, str]) -> str:
    """The type of a stored tensor: F32 for vectors and routers, else that of the last key in `kinds` contained in its name."""
    if "norm" in name or name.endswith("bias") or "ffn_gate_inp" in name:
        return "F32"
    return [kind for part, kind in kinds.items() if part in name][-1]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kinds: Mapping[str, str],
    *,
    edit: Edit | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    **forms: bool,
) -> Path:
    """Args:
    kinds: see `kind_of`; "" is the type of the rest.
    edit: changes metadata and tensors before they are written, to make a file invalid.
    forms: see `tensors`.
    """
    values, arrays = metadata(model.config), tensors(model, **forms)
    if edit is not None:
        edit(values, arrays)
    writer = gguf.GGUFWriter(path, values.pop("architecture", "deepseek2"))
    adders: dict[type, Any] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string
    }  # fmt: skip
    for key, value in values.items():
        adders[type(value)](f"{writer.arch}.{key}", value)
    if tokenizer is not None:
        tokenizer(writer)
    for name, array in arrays.items():
        code = GGMLQuantizationType[kind_of(name, kinds)]
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(array), code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(model: PreTrainedModel, kinds: Mapping[str, str], **forms: bool) -> PreTrainedModel:
    """A float32 model with the values that `write_gguf` stores, computed without our reader."""
    twin = copy.deepcopy(model).float()
    state, config = twin.state_dict(), model.config
    kept: dict[str, Any] = {}
    for name, array in tensors(model, **forms).items():
        code = GGMLQuantizationType[kind_of(name, kinds)]
        kept[name] = torch.from_numpy(quants.dequantize(quants.quantize(np.ascontiguousarray(array), code), code).copy())
    for name in state:
        if name in _TOP:
            state[name] = kept.get(f"{_TOP[name]}.weight", kept["token_embd.weight"])
            continue
        _, _, layer, *path, leaf = name.split(".")
        block, part = f"blk.{layer}.", ".".join(path)
        if leaf == "e_score_correction_bias":
            state[name] = kept[f"{block}exp_probs_b.bias"]
        elif leaf == "gate_up_proj":
            apart: list[Any] = [kept.get(f"{block}ffn_{role}_exps.weight") for role in ("gate", "up")]
            state[name] = kept[f"{block}ffn_gate_up_exps.weight"] if apart[0] is None else torch.cat(apart, 1)
        elif leaf == "down_proj":
            state[name] = kept[f"{block}ffn_down_exps.weight"]
        elif part == "self_attn.kv_b_proj":
            whole = kept.get(f"{block}attn_kv_b.weight")
            halves: tuple[Any, Any] = (kept.get(f"{block}attn_k_b.weight"), kept.get(f"{block}attn_v_b.weight"))
            state[name] = torch.cat([halves[0].mT, halves[1]], 1).reshape(-1, config.kv_lora_rank) if whole is None else whole
        else:
            state[name] = kept[f"{block}{LAYER[part]}.{leaf}"]
    twin.load_state_dict(state)
    return twin
