"""Writes GGUF files of models of every family in the layout of llama.cpp's converter; `gguf_families` has the cases.

case = CASES["gemma2"]
model = random_model(case.config())
write_gguf(path, case, model, "Q8_0")

Names of tensors come from llama.cpp's package (`gguf.get_tensor_name_map`); keys and changes of tensors are those of
`set_gguf_parameters` and `modify_tensors` in llama.cpp's `conversion/`. Nothing here is derived from the reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from transformers import PreTrainedModel

Tensors = Iterator[tuple[str, np.ndarray]]
Convert = Callable[[str, np.ndarray, Any], Iterable[tuple[str, np.ndarray]]]


@dataclass(frozen=True)
class Case:
    """Attributes:
    arch: `general.architecture`.
    config: makes the config.
    keys: metadata besides the common ones, or other values for them; None removes a key.
    convert: makes the stored tensors of a parameter from its name, value and the config.
    extra: tensors that are not parameters.
    names: the architecture whose tensors' names it shares, if the installed package does not know it yet.
    """

    arch: str
    config: Callable[[], Any]
    keys: Callable[[Any], dict[str, Any]] = lambda c: {}
    convert: Convert = lambda name, value, c: [(name, value)]
    extra: Callable[[Any], dict[str, list[float]]] = field(default=lambda c: {})
    names: str = ""


def of_layer(config: Any, layer: int) -> Any:
    """The config that holds for one layer, of those whose layers differ."""
    return config.per_layer_config[layer] if getattr(config, "per_layer_config", None) else config


def common(config: Any) -> dict[str, Any]:
    """TextModel.set_gguf_parameters: keys without the architecture."""
    config = of_layer(config, 0)

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    rope = first("rope_parameters") or {}
    main = rope.get("full_attention", rope)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": main.get("rope_theta"),
        "rope.freq_base_swa": rope.get("sliding_attention", {}).get("rope_theta"),
        "attention.layer_norm_rms_epsilon": first("rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": first("layer_norm_eps", "norm_epsilon"),
        "expert_count": first("num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": first("num_experts_per_tok"),
        "expert_group_count": first("n_group"),
        "expert_group_used_count": first("topk_group"),
        "attention.key_length": first("head_dim"),
        "attention.value_length": first("head_dim"),
    }
    if main.get("rope_type") in ("linear", "yarn"):
        values |= {"rope.scaling.type": main["rope_type"], "rope.scaling.factor": float(main["factor"])}
    if main.get("rope_type") == "yarn":
        values |= {
            "rope.scaling.original_context_length": main["original_max_position_embeddings"],
            "rope.scaling.yarn_attn_factor": main.get("attention_factor"),
            "rope.scaling.yarn_beta_fast": float(main["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(main["beta_slow"]),
        }
    return values


def head_dim(c: Any) -> int:
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def rotated(c: Any) -> dict[str, Any]:
    """Number of rotated elements of a head."""
    return {"rope.dimension_count": int(head_dim(c) * c.rope_parameters.get("partial_rotary_factor", 1.0))}


def window(c: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": c.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in c.layer_types],
    }


def llama_keys(c: Any) -> dict[str, Any]:
    return {"vocab_size": c.vocab_size, "rope.dimension_count": head_dim(c)}


def llama4_keys(c: Any) -> dict[str, Any]:
    """Llama4Model.set_gguf_parameters."""
    return {
        **llama_keys(c), "feed_forward_length": c.intermediate_size_mlp, "expert_feed_forward_length": c.intermediate_size,
        "interleave_moe_layer_step": c.interleave_moe_layer_step,
        "attention.sliding_window": None if "chunked_attention" in c.layer_types else 0,
    }  # fmt: skip


def ministral3_keys(c: Any) -> dict[str, Any]:
    return {
        **llama_keys(c), "attention.temperature_scale": c.rope_parameters["llama_4_scaling_beta"],
        "rope.scaling.yarn_log_multiplier": c.rope_parameters["mscale_all_dim"],
    }  # fmt: skip


def gemma4_keys(c: Any) -> dict[str, Any]:
    """Gemma4Model.set_gguf_parameters."""
    first, swa = c.num_hidden_layers - c.num_kv_shared_layers, [kind == "sliding_attention" for kind in c.layer_types]
    by_layer = [of_layer(c, i) for i in range(c.num_hidden_layers)]
    full = by_layer[swa.index(False)].head_dim
    keys = {
        "attention.shared_kv_layers": c.num_kv_shared_layers, "attention.sliding_window": c.sliding_window,
        "embedding_length_per_layer_input": c.hidden_size_per_layer_input, "attention.sliding_window_pattern": swa,
        "attention.key_length": full, "attention.value_length": full, "attention.key_length_swa": by_layer[0].head_dim,
        "attention.value_length_swa": by_layer[0].head_dim, "rope.dimension_count": full,
        "rope.dimension_count_swa": by_layer[0].head_dim,
        "final_logit_softcapping": c.final_logit_softcapping, "expert_count": c.num_experts if c.enable_moe_block else None,
        "expert_used_count": c.top_k_experts if c.enable_moe_block else None,
        "expert_feed_forward_length": c.moe_intermediate_size if c.enable_moe_block else None,
    }  # fmt: skip
    if c.use_double_wide_mlp:
        keys["feed_forward_length"] = [c.intermediate_size * (1 + (i >= first)) for i in range(c.num_hidden_layers)]
    if c.attention_k_eq_v:
        keys["attention.head_count_kv"] = [each.num_key_value_heads for each in by_layer]
    return keys


def gemma4_frequencies(c: Any) -> dict[str, list[float]]:
    """Gemma4Model.generate_extra_tensors."""
    size = of_layer(c, c.layer_types.index("full_attention")).head_dim
    rotated = int(size * c.rope_parameters["full_attention"]["partial_rotary_factor"] / 2)
    return {"rope_freqs.weight": [1.0] * rotated + [1e30] * (size // 2 - rotated)}


def gemma4(name: str, value: np.ndarray, c: Any) -> Tensors:
    """Gemma4Model.modify_tensors, filter_tensors."""
    yield f"{name}.weight" if name.endswith(("layer_scalar", ".gate_up_proj", ".down_proj")) else name, value


def granite_keys(c: Any) -> dict[str, Any]:
    return {
        **llama_keys(c), "attention.scale": c.attention_multiplier, "embedding_scale": c.embedding_multiplier,
        "residual_scale": c.residual_multiplier, "logit_scale": c.logits_scaling, "attention.key_length": None,
        "attention.value_length": None,
    }  # fmt: skip


def experts_keys(c: Any) -> dict[str, Any]:
    shared = getattr(c, "shared_expert_intermediate_size", None)
    return {"expert_feed_forward_length": c.moe_intermediate_size, "expert_shared_feed_forward_length": shared}


def delta_keys(c: Any) -> dict[str, Any]:
    return {
        **(experts_keys(c) if hasattr(c, "moe_intermediate_size") else {}), **rotated(c),
        "ssm.conv_kernel": c.linear_conv_kernel_dim, "ssm.state_size": c.linear_key_head_dim,
        "ssm.group_count": c.linear_num_key_heads, "ssm.time_step_rank": c.linear_num_value_heads,
        "ssm.inner_size": c.linear_value_head_dim * c.linear_num_value_heads, "full_attention_interval": 4,
        "attention.recurrent_layers": [kind == "linear_attention" for kind in c.layer_types],
    }  # fmt: skip


def glm_moe_keys(c: Any) -> dict[str, Any]:
    return {
        **experts_keys(c), **rotated(c), "expert_shared_count": c.n_shared_experts, "expert_gating_func": 2,
        "leading_dense_block_count": 1, "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": c.norm_topk_prob,
    }  # fmt: skip


def latent_keys(c: Any) -> dict[str, Any]:
    return {
        **experts_keys(c), "vocab_size": c.vocab_size, "attention.head_count_kv": 1, "attention.q_lora_rank": c.q_lora_rank,
        "attention.kv_lora_rank": c.kv_lora_rank, "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank, "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "attention.value_length_mla": c.v_head_dim, "rope.dimension_count": c.qk_rope_head_dim,
        "expert_shared_count": c.n_shared_experts, "leading_dense_block_count": 1,
        "expert_weights_scale": c.routed_scaling_factor,
    }  # fmt: skip


def mistral4_keys(c: Any) -> dict[str, Any]:
    """Mistral4Model, DeepseekV2Model.set_gguf_parameters, without the growth of the queries."""
    return {
        **latent_keys(c), "expert_weights_norm": c.norm_topk_prob, "leading_dense_block_count": c.first_k_dense_replace,
        "rope.scaling.yarn_log_multiplier": 0.1 * c.rope_parameters["mscale_all_dim"],
    }  # fmt: skip


def indexed_keys(c: Any) -> dict[str, Any]:
    """DeepseekV32Model.set_gguf_parameters."""
    return {
        **latent_keys(c), "expert_weights_norm": c.norm_topk_prob, "expert_gating_func": 2,
        "leading_dense_block_count": c.mlp_layer_types.count("dense"), "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim, "attention.indexer.top_k": c.index_topk,
    }  # fmt: skip


def glm_indexed_keys(c: Any) -> dict[str, Any]:
    """GlmMoeDsaModel.set_gguf_parameters."""
    return {**indexed_keys(c), "attention.indexer.types": [kind == "full" for kind in c.indexer_types]}


def kimi_keys(c: Any) -> dict[str, Any]:
    return {
        **latent_keys(c), "attention.head_count_kv": [int(kind == "full_attention") for kind in c.layer_types],
        "attention.value_length": c.head_dim, "ssm.conv_kernel": c.linear_conv_kernel_dim, "kda.head_dim": c.linear_head_dim,
        "expert_gating_func": 2, "expert_group_count": None, "rope.freq_base": None,
    }  # fmt: skip


def lfm2_keys(c: Any) -> dict[str, Any]:
    kv_heads = [0 if kind == "conv" else c.num_key_value_heads for kind in c.layer_types]
    return {"attention.head_count_kv": kv_heads, "vocab_size": c.vocab_size, "shortconv.l_cache": c.conv_L_cache}


def lfm2_width(c: Any) -> int:
    """The width that Lfm2Config computes from `intermediate_size`."""
    width = int(2 * c.intermediate_size / 3)
    return c.block_multiple_of * -(-width // c.block_multiple_of)


def phi3_keys(c: Any) -> dict[str, Any]:
    rope = c.rope_parameters
    keys = {
        "rope.scaling.original_context_length": c.original_max_position_embeddings, **rotated(c),
        "attention.sliding_window": c.sliding_window or 0, "attention.key_length": None, "attention.value_length": None,
    }  # fmt: skip
    if rope["rope_type"] == "longrope":
        original = c.original_max_position_embeddings
        scale = c.max_position_embeddings / original
        keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return keys


def stablelm_keys(c: Any) -> dict[str, Any]:
    return {
        **rotated(c), "use_parallel_residual": c.use_parallel_residual, "rope.freq_base": None,
        "attention.layer_norm_rms_epsilon": None,
    }  # fmt: skip


def long_factors(c: Any) -> dict[str, list[float]]:
    if c.rope_parameters["rope_type"] != "longrope":
        return {}
    return {f"rope_factors_{kind}.weight": c.rope_parameters[f"{kind}_factor"] for kind in ("long", "short")}


def llama3_factors(c: Any) -> dict[str, list[float]]:
    """LlamaModel.generate_extra_tensors."""
    rope, factors = c.rope_parameters, []
    if rope["rope_type"] != "llama3":
        return {}
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    for i in range(0, head_dim(c), 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / head_dim(c))
        if length < original / high or length > original / low:
            factors.append(1.0 if length < original / high else rope["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": factors}


def permuted(name: str, value: np.ndarray, c: Any) -> Tensors:
    """LlamaModel.permute: halves of a head become pairs."""
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
    if heads:
        value = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    yield name, value


def plus_one(name: str, value: np.ndarray, c: Any) -> Tensors:
    yield name, value + 1 if name.endswith("norm.weight") else value


def latent(name: str, value: np.ndarray, c: Any) -> Tensors:
    if not name.endswith("kv_b_proj.weight"):
        yield name, value
        return
    kv_b = value.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, -1)
    yield name.replace("kv_b", "k_b"), kv_b[:, : c.qk_nope_head_dim].transpose(0, 2, 1)
    yield name.replace("kv_b", "v_b"), kv_b[:, c.qk_nope_head_dim :]


def llama4(name: str, value: np.ndarray, c: Any) -> Tensors:
    """Llama4Model.modify_tensors."""
    yield name, value.transpose(0, 2, 1) if ".experts." in name else value


def mistral4(name: str, value: np.ndarray, c: Any) -> Tensors:
    """Mistral4Model.modify_tensors: gate and up of experts stay one tensor."""
    yield from latent(f"{name}.weight" if name.endswith((".gate_up_proj", ".down_proj")) else name, value, c)


def kimi(name: str, value: np.ndarray, c: Any) -> Tensors:
    name = name.replace("forget_gate.", "").replace("dt_bias", "dt_proj.bias")
    if name.endswith(".conv1d.weight"):
        for part, each in zip("qkv", np.split(value, 3), strict=True):
            yield name.replace("conv1d", f"{part}_conv1d"), each.reshape(1, -1, 1, value.shape[-1])
    else:
        yield from latent(name, -np.exp(value) if name.endswith("A_log") else value, c)


def delta(name: str, value: np.ndarray, c: Any) -> Tensors:
    """Qwen3NextModel.modify_tensors."""
    if name.endswith(".A_log"):
        value = -np.exp(value)
    elif name.endswith(".dt_bias"):
        name = name.replace("dt_bias", "dt_proj.bias")
    elif "conv1d" in name:
        value = value.squeeze()
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        value = value + 1
    if "in_proj_qkvz" not in name:
        yield name, value
        return
    keys, dim, each = c.linear_num_key_heads, c.linear_key_head_dim, c.linear_num_value_heads // c.linear_num_key_heads
    cuts = np.cumsum([dim, dim, each * c.linear_value_head_dim])
    q, k, v, z = (part.reshape(-1, c.hidden_size) for part in np.split(value.reshape(keys, -1, c.hidden_size), cuts, 1))
    yield name.replace("in_proj_qkvz", "in_proj_qkv"), np.concatenate([q, k, v])
    yield name.replace("in_proj_qkvz", "in_proj_z"), z


def tiled(name: str, value: np.ndarray, c: Any) -> Tensors:
    """_LinearAttentionVReorderBase: the i-th value head of every key head, for each i in turn."""
    keys, each = c.linear_num_key_heads, c.linear_num_value_heads // c.linear_num_key_heads

    def heads(part: np.ndarray) -> np.ndarray:
        return part.reshape(keys, each, -1, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape)

    if ".in_proj_qkv." in name or ".conv1d." in name:
        first = 2 * keys * c.linear_key_head_dim
        value = np.concatenate([value[:first], heads(value[first:])])
    elif any(part in name for part in (".in_proj_z.", ".in_proj_b.", ".in_proj_a.", ".A_log", ".dt_bias")):
        value = heads(value)
    elif ".linear_attn.out_proj." in name:
        value = heads(value.T).T
    yield from delta(name, value, c)


def short_conv(name: str, value: np.ndarray, c: Any) -> Tensors:
    yield name, value.squeeze(1) if "conv.conv" in name else value


def tensors(case: Case, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The stored tensors by their GGUF names, in float32."""
    config = model.config
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[case.names or case.arch], config.num_hidden_layers)
    stored: dict[str, np.ndarray] = {}
    for path, parameter in model.state_dict().items():
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for name, value in case.convert(path, parameter.float().numpy(), config):
            block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
            if name.endswith(("router.scale", "router.per_expert_scale")):
                stored[f"{block}{'ffn_gate_inp' if name.endswith('router.scale') else 'ffn_down_exps'}.scale"] = value
            elif name.endswith(".experts.gate_up_proj"):
                stored[f"{block}ffn_gate_exps.weight"], stored[f"{block}ffn_up_exps.weight"] = np.split(value, 2, 1)
            elif name.endswith(".experts.down_proj"):
                stored[f"{block}ffn_down_exps.weight"] = value
            elif name.endswith(("e_score_correction_bias", "expert_bias")):
                stored[f"{block}exp_probs_b.bias"] = value
            else:
                key = names.get_name(name.replace("_moe.router.", "_moe.router.layer."), (".weight", ".bias"))
                assert key is not None, f"{name} has no name in {case.arch}"
                stored[key] = value
    return stored | {name: np.array(values, np.float32) for name, values in case.extra(config).items()}


def kind_of(name: str, value: np.ndarray, kind: str) -> str:
    """The type of a stored tensor: F32 for those that llama.cpp never quantizes, and for rows that are not whole blocks.

    Nor for kv_b_proj, part of which is transposed, so that blocks of rounded rows would be rounded again.
    """
    never = ("norm", "ffn_gate_inp", "ssm_conv1d", "shortconv.conv", "attn_k_b", "attn_v_b", "indexer.proj")
    if value.ndim not in (2, 3) or value.shape[-1] % BLOCK[kind] or any(part in name for part in never):
        return "F32"
    return kind


BLOCK = {"F32": 1, "F16": 1, "Q8_0": 32}


def rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model itself, with matrices changed so that they are the same after being written and loaded.

    Rows that are not whole blocks, and the transposed halves of kv_b_proj, are stored in F32 and loaded in bf16.
    """
    code = GGMLQuantizationType[kind]
    for name, parameter in model.named_parameters():
        if parameter.ndim not in (2, 3) or kind == "F32":
            continue
        transposed = model.config.model_type == "llama4_text" and parameter.ndim == 3
        rows = parameter.detach().float().transpose(-1, -2).contiguous() if transposed else parameter.detach().float()
        if rows.shape[-1] % BLOCK[kind] == 0 and not name.endswith("kv_b_proj.weight"):
            exact = quants.dequantize(quants.quantize(rows.numpy(), code), code).reshape(rows.shape)
            parameter.data = torch.from_numpy((exact.swapaxes(-1, -2) if transposed else exact).copy())
        elif parameter.ndim == 2 and kind == "Q8_0":
            parameter.data = parameter.data.bfloat16().float()
    return model


def write_gguf(
    path: Path,
    case: Case,
    model: PreTrainedModel,
    kind: str = "F32",
    *,
    edit: Callable[[dict[str, Any], dict[str, np.ndarray]], None] | None = None,
    blocks: Mapping[str, tuple[str, np.ndarray]] | None = None,
) -> Path:
    """Args:
    kind: the type of matrices.
    edit: changes metadata and tensors before they are written.
    blocks: tensors to write in another type: the type and the blocks, uint8 [rows, bytes of a row], by name.
    """
    values = {key: value for key, value in (common(model.config) | case.keys(model.config)).items() if value is not None}
    arrays = tensors(case, model)
    if edit is not None:
        edit(values, arrays)
    writer = gguf.GGUFWriter(path, case.arch)
    for key, value in values.items():
        name = key if key.startswith("tokenizer.") else f"{case.arch}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](name, value)
    for name, (other, rows) in (blocks or {}).items():
        del arrays[name]
        writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType[other])
    for name, array in arrays.items():
        code = GGMLQuantizationType[kind_of(name, array, kind)]
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(array, np.float32), code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
