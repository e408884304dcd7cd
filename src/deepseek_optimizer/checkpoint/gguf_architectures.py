"""GGUF architectures: the config and parameter names that correspond to the metadata and tensors of each.

An `Architecture` lists how one differs from Llama. Facts are llama.cpp's: `conversion/*.py` for what its converter writes, and
`src/models/*.cpp` for what it assumes where a file has no key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import gguf_gemma4, gguf_llama4
from .gguf_deepseek2 import (
    deepseek2_config,
    glm_sparse_config,
    kimi_config,
    mistral4_config,
    sparse_config,
    split_kv_b,
)
from .gguf_delta import convolution_channels, group_value_heads, join_convolutions, join_projections
from .gguf_fields import (
    Reader,
    count,
    expert_width,
    fixed,
    gemma_scale,
    growing_queries,
    has_experts,
    has_temperature,
    has_window,
    head_dim,
    kv_heads,
    not_recurrent,
    number,
    optional,
    recurrent,
    shared_width,
    sliding,
    stores,
    window,
    windowed,
    with_kv_heads,
)
from .gguf_gpt_oss import NAMES, exact_yarn, join_biases
from .gguf_metadata import Metadata
from .gguf_parameters import Parameter

Names = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture; the defaults are Llama's.

    Attributes:
        model: Transformers' `model_type`, and the first part of its class for causal language models.
        when: which of the files of this architecture it is about.
        others: model types of further families that `rest` may choose.
        fields: fields of the config besides the common ones: see `gguf_config`.
        names: names in a layer that differ from `LAYER`.
        top: names outside of the layers that differ from `TOP`.
        mlp: name of the module of a layer's MLP.
        rope: "halves"; "pairs": llama.cpp rotates pairs and Transformers halves, and rows of q and k are permuted accordingly.
        epsilon: name of the config field for the norms' epsilon, and its key.
        activation: name of the config field for the activation function, and its value.
        offset_norms: the file has the weights of norms plus 1, as llama.cpp multiplies by them.
        unchanged: norms to which `offset_norms` does not apply.
        partial: `rope.dimension_count` elements of a head are rotated, and the config has their share.
        frequencies: makes `rope_parameters` of the factors of RoPE's frequencies; None: they are llama3's.
        local_theta: base of the RoPE of sliding layers, which is not scaled; None: all layers share one RoPE.
        rest: further fields, given the metadata and the common `rope_parameters`.
        rearrange: functions that change the parameters which are not whole tensors, given the config and, for errors, the file.
    """

    model: tuple[str, str]
    when: Callable[[Metadata], bool] = lambda meta: True
    others: tuple[str, ...] = ()
    fields: Mapping[str, Reader] = field(default_factory=dict)
    names: Names = field(default_factory=dict)
    top: Names = field(default_factory=dict)
    mlp: str = "mlp"
    rope: str = "halves"
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    activation: tuple[str, str] = ("hidden_act", "silu")
    offset_norms: bool = False
    unchanged: tuple[str, ...] = ()
    partial: bool = False
    frequencies: Callable[[Metadata, torch.Tensor | None], dict[str, Any]] | None = None
    local_theta: Reader | None = None
    rest: Callable[[Metadata, dict[str, Any]], dict[str, Any]] = lambda meta, rope: {}
    rearrange: tuple[Callable[[dict[str, Parameter], Mapping[str, Any], Path], None], ...] = ()


TOP: Names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER: Names = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}

_ATTENTION_BIAS: Mapping[str, Reader] = {"attention_bias": stores("attn_q.bias", "attn_qkv.bias")}
_BIASES: Mapping[str, Reader] = {**_ATTENTION_BIAS, "mlp_bias": stores("ffn_up.bias")}
_HEAD_DIM: Mapping[str, Reader] = {"head_dim": head_dim}
_USED: Mapping[str, Reader] = {"num_experts_per_tok": count("expert_used_count")}
_EXPERT_WIDTH: Mapping[str, Reader] = {"moe_intermediate_size": expert_width}
_SHARED: Names = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_LATENT: Names = {
    **_SHARED,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
}
_INDEXED: Names = {
    **_LATENT,
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
}
# Norms before and after attention and MLP, as in Gemma 2; or after them only, as in OLMo 2.
_SANDWICH: Names = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_AFTER: Names = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_ONE_SHARED: Names = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_QWEN_SHARED: Names = {**_ONE_SHARED, "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
_QWEN_EXPERTS: Mapping[str, Reader] = {
    **_USED,
    **_EXPERT_WIDTH,
    "num_experts": count("expert_count"),
    "shared_expert_intermediate_size": shared_width,
}
_GRANITE: Mapping[str, Reader] = {
    **_BIASES,
    "attention_multiplier": lambda meta: meta.number(meta.of_model("attention.scale"), head_dim(meta) ** -0.5),
    "embedding_multiplier": number("embedding_scale", 1.0),
    "residual_multiplier": number("residual_scale", 1.0),
    "logits_scaling": number("logit_scale"),
}
_DELTA_NET: Mapping[str, Reader] = {
    **_HEAD_DIM,
    **_ATTENTION_BIAS,
    "layer_types": recurrent("linear_attention", not_recurrent),
    "linear_conv_kernel_dim": count("ssm.conv_kernel"),
    "linear_key_head_dim": count("ssm.state_size"),
    "linear_num_key_heads": count("ssm.group_count"),
    "linear_num_value_heads": count("ssm.time_step_rank"),
    "linear_value_head_dim": lambda meta: count("ssm.inner_size")(meta) // count("ssm.time_step_rank")(meta),
}
_DELTA_NET_NAMES: Names = {
    **_QWEN_SHARED,
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_LFM2: Mapping[str, Reader] = {
    "conv_L_cache": count("shortconv.l_cache"),
    "conv_bias": fixed(False),
    "layer_types": recurrent("conv", with_kv_heads),
    "num_key_value_heads": kv_heads,
}
_LFM2_NAMES: Names = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "ffn_gate": "mlp.w1",
    "ffn_up": "mlp.w3",
    "ffn_down": "mlp.w2",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "exp_probs_b.bias": "mlp.expert_bias",
}
_GELU = ("hidden_activation", "gelu_pytorch_tanh")
_LAYER_NORM = "attention.layer_norm_epsilon"

# By `general.architecture`; the first whose `when` holds.
ARCHITECTURES: Mapping[str, tuple[Architecture, ...]] = {
    "llama": (
        Architecture(
            model=("mixtral", "Mixtral"), when=has_experts, rope="pairs",
            fields={**_HEAD_DIM, **_USED, "num_local_experts": count("expert_count"), "sliding_window": fixed(None)},
        ),
        Architecture(model=("llama", "Llama"), rope="pairs", fields={**_HEAD_DIM, **_BIASES}),
    ),
    "llama4": (
        Architecture(
            model=("llama4_text", "Llama4"), mlp="feed_forward", rest=gguf_llama4.llama4_config,
            names={**_ONE_SHARED, "ffn_gate_inp": "mlp.router"},
            fields={
                **_HEAD_DIM, **_ATTENTION_BIAS, **_USED, "num_local_experts": count("expert_count"),
                "intermediate_size": count("expert_feed_forward_length"), "intermediate_size_mlp": count("feed_forward_length"),
                "interleave_moe_layer_step": count("interleave_moe_layer_step"),
            },
        ),
    ),
    "mistral3": (
        Architecture(
            model=("ministral3", "Ministral3"), when=has_temperature, rope="pairs",
            fields={**_HEAD_DIM, "sliding_window": fixed(None)}, rest=growing_queries,
        ),
        Architecture(model=("mistral", "Mistral"), rope="pairs", fields={**_HEAD_DIM, "sliding_window": fixed(None)}),
    ),
    "qwen2": (Architecture(model=("qwen2", "Qwen2"), fields=_HEAD_DIM),),
    "qwen2moe": (
        Architecture(
            model=("qwen2_moe", "Qwen2Moe"), names=_QWEN_SHARED,
            fields={**_QWEN_EXPERTS, "norm_topk_prob": fixed(False), "qkv_bias": stores("attn_q.bias")},
        ),
    ),
    "qwen3": (Architecture(model=("qwen3", "Qwen3"), fields={**_HEAD_DIM, **_ATTENTION_BIAS}),),
    "qwen3moe": (
        Architecture(
            model=("qwen3_moe", "Qwen3Moe"),
            fields={
                **_HEAD_DIM, **_ATTENTION_BIAS, **_USED, **_EXPERT_WIDTH, "num_experts": count("expert_count"),
                "norm_topk_prob": fixed(True),
            },
        ),
    ),
    "qwen3next": (
        Architecture(
            model=("qwen3_next", "Qwen3Next"), names=_DELTA_NET_NAMES, offset_norms=True, unchanged=("ssm_norm",),
            partial=True, rearrange=(join_projections,), fields={**_DELTA_NET, **_QWEN_EXPERTS, "norm_topk_prob": fixed(True)},
        ),
    ),
    "qwen35": (
        Architecture(
            model=("qwen3_5_text", "Qwen3_5"), names=_DELTA_NET_NAMES, offset_norms=True, unchanged=("ssm_norm",),
            partial=True, rearrange=(group_value_heads,), fields=_DELTA_NET,
        ),
    ),
    "qwen35moe": (
        Architecture(
            model=("qwen3_5_moe_text", "Qwen3_5Moe"), names=_DELTA_NET_NAMES, offset_norms=True, unchanged=("ssm_norm",),
            partial=True, rearrange=(group_value_heads,), fields={**_DELTA_NET, **_QWEN_EXPERTS},
        ),
    ),
    "gemma": (
        Architecture(model=("gemma", "Gemma"), activation=("hidden_act", _GELU[1]), offset_norms=True, fields=_HEAD_DIM),
    ),
    "gemma2": (
        Architecture(
            model=("gemma2", "Gemma2"), activation=_GELU, offset_norms=True, names=_SANDWICH,
            fields={
                **_HEAD_DIM, "sliding_window": count("attention.sliding_window", 4096), "layer_types": sliding(2),
                "query_pre_attn_scalar": gemma_scale(46), "attn_logit_softcapping": number("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": number("final_logit_softcapping", 30.0),
            },
        ),
    ),
    "gemma3": (
        Architecture(
            model=("gemma3_text", "Gemma3"), activation=_GELU, offset_norms=True, names=_SANDWICH,
            local_theta=number("rope.freq_base_swa", 10000.0),
            fields={
                **_HEAD_DIM, "sliding_window": window(), "layer_types": windowed(6),
                "query_pre_attn_scalar": gemma_scale(62), "final_logit_softcapping": optional("final_logit_softcapping"),
            },
        ),
    ),
    "gemma4": (
        Architecture(
            model=("gemma4_text", "Gemma4"), activation=_GELU, names=gguf_gemma4.NAMES, top=gguf_gemma4.TOP,
            frequencies=gguf_gemma4.proportional, local_theta=number("rope.freq_base_swa", 10000.0),
            fields={"intermediate_size": fixed(None), "num_key_value_heads": fixed(None)}, rest=gguf_gemma4.gemma4_config,
            rearrange=(gguf_gemma4.drop_shared,),
        ),
    ),
    "phi3": (
        Architecture(
            model=("phi3", "Phi3"), partial=True, names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
            fields={
                "sliding_window": window(),
                "original_max_position_embeddings": lambda meta: count(
                    "rope.scaling.original_context_length", count("context_length")(meta)
                )(meta),
            },
        ),
    ),
    "chatglm": (
        Architecture(
            model=("glm", "Glm"), partial=True, names={"ffn_up": "mlp.gate_up_proj"}, fields={**_HEAD_DIM, **_ATTENTION_BIAS},
        ),
    ),
    "glm4": (
        Architecture(
            model=("glm4", "Glm4"), partial=True, fields={**_HEAD_DIM, **_ATTENTION_BIAS},
            names={
                "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
                "ffn_up": "mlp.gate_up_proj",
            },
        ),
    ),
    "glm4moe": (
        Architecture(
            model=("glm4_moe", "Glm4Moe"), partial=True, names={**_SHARED, "post_attention_norm": "post_attention_layernorm"},
            fields={
                **_HEAD_DIM, **_ATTENTION_BIAS, **_USED, **_EXPERT_WIDTH, "use_qk_norm": stores("attn_q_norm.weight"),
                "n_routed_experts": count("expert_count"), "n_shared_experts": count("expert_shared_count"),
                "first_k_dense_replace": count("leading_dense_block_count", 0, 0), "n_group": count("expert_group_count", 1),
                "topk_group": count("expert_group_used_count", 1),
                "norm_topk_prob": lambda meta: meta.flag(meta.of_model("expert_weights_norm")),
                "routed_scaling_factor": number("expert_weights_scale", 1.0), "num_nextn_predict_layers": fixed(0),
            },
        ),
    ),
    "deepseek2": (
        Architecture(
            model=("glm4_moe_lite", "Glm4MoeLite"), when=lambda meta: meta.values.get("tokenizer.ggml.pre") == "glm4",
            names=_LATENT, rest=deepseek2_config, rearrange=(split_kv_b,),
        ),
        Architecture(
            model=("deepseek_v3", "DeepseekV3"), others=("deepseek_v2", "youtu"), names=_LATENT, rest=deepseek2_config,
            rearrange=(split_kv_b,),
        ),
    ),
    "deepseek32": (
        Architecture(
            model=("deepseek_v32", "DeepseekV32"), names=_INDEXED, rest=sparse_config, rearrange=(split_kv_b,),
        ),
    ),
    "glm-dsa": (
        Architecture(
            model=("glm_moe_dsa", "GlmMoeDsa"), names=_INDEXED, rest=glm_sparse_config, rearrange=(split_kv_b,),
        ),
    ),
    "mistral4": (
        Architecture(model=("mistral4", "Mistral4"), names=_LATENT, rest=mistral4_config, rearrange=(split_kv_b,)),
    ),
    "granite": (Architecture(model=("granite", "Granite"), rope="pairs", fields=_GRANITE),),
    "granitemoe": (
        Architecture(
            model=("granitemoe", "GraniteMoe"), rope="pairs", mlp="block_sparse_moe", names={"ffn_gate_inp": "mlp.router"},
            fields={**_GRANITE, **_USED, "num_local_experts": count("expert_count")},
        ),
    ),
    "olmo2": (
        Architecture(
            model=("olmo3", "Olmo3"), when=has_window, names=_AFTER,
            local_theta=lambda meta: number("rope.freq_base_swa", number("rope.freq_base", 10000.0)(meta))(meta),
            fields={**_ATTENTION_BIAS, "sliding_window": window(), "layer_types": sliding(4)},
        ),
        Architecture(model=("olmo2", "Olmo2"), names=_AFTER, fields=_ATTENTION_BIAS),
    ),
    "smollm3": (
        Architecture(
            model=("smollm3", "SmolLM3"), rope="pairs",
            fields={**_BIASES, "no_rope_layer_interval": fixed(4), "use_sliding_window": fixed(False)},
        ),
    ),
    "exaone4": (
        Architecture(
            model=("exaone4", "Exaone4"), names=_AFTER,
            fields={
                **_HEAD_DIM, "sliding_window": window(),
                "layer_types": windowed(4),
            },
        ),
    ),
    "ernie4_5": (Architecture(model=("ernie4_5", "Ernie4_5"), fields={**_HEAD_DIM, "use_bias": stores("attn_output.bias")}),),
    "seed_oss": (
        Architecture(
            model=("seed_oss", "SeedOss"), names={"post_attention_norm": "post_attention_layernorm"},
            fields={**_HEAD_DIM, **_BIASES, "attention_out_bias": stores("attn_output.bias")},
        ),
    ),
    "hunyuan-dense": (
        Architecture(
            model=("hunyuan_v1_dense", "HunYuanDenseV1"), fields={**_HEAD_DIM, **_ATTENTION_BIAS},
            names={"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
        ),
    ),
    "stablelm": (
        Architecture(
            model=("stablelm", "StableLm"), partial=True, epsilon=("layer_norm_eps", _LAYER_NORM),
            fields={
                "qk_layernorm": stores("attn_q_norm.weight"), "use_qkv_bias": stores("attn_q.bias"),
                "use_parallel_residual": lambda meta: "blk.0.ffn_norm.weight" not in meta.tensors,
            },
        ),
    ),
    "starcoder2": (
        Architecture(
            model=("starcoder2", "Starcoder2"), epsilon=("norm_epsilon", _LAYER_NORM), activation=("hidden_act", _GELU[1]),
            names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
            fields={"use_bias": stores("attn_output.bias"), "sliding_window": window()},
        ),
    ),
    "cohere2": (
        Architecture(
            model=("cohere2", "Cohere2"), epsilon=("layer_norm_eps", _LAYER_NORM),
            fields={
                **_HEAD_DIM, **_ATTENTION_BIAS, "logit_scale": number("logit_scale"), "layer_types": sliding(4),
                "sliding_window": count("attention.sliding_window"),
            },
        ),
    ),
    "minimax-m2": (
        Architecture(
            model=("minimax_m2", "MiniMaxM2"), names={"exp_probs_b.bias": "mlp.e_score_correction_bias"},
            fields={
                **_HEAD_DIM, **_USED, "num_local_experts": count("expert_count"),
                "intermediate_size": count("expert_feed_forward_length"), "rotary_dim": count("rope.dimension_count"),
            },
        ),
    ),
    "gpt-oss": (
        Architecture(
            model=("gpt_oss", "GptOss"), names=NAMES, rest=exact_yarn, rearrange=(join_biases,),
            fields={
                **_HEAD_DIM, **_ATTENTION_BIAS, **_USED, "num_local_experts": count("expert_count"),
                "intermediate_size": count("expert_feed_forward_length"), "sliding_window": window(),
                "layer_types": sliding(2),
            },
        ),
    ),
    "lfm2": (
        Architecture(
            model=("lfm2", "Lfm2"), mlp="feed_forward", names=_LFM2_NAMES, rearrange=(convolution_channels,),
            top={"token_embd_norm": "model.embedding_norm"},
            epsilon=("norm_eps", "attention.layer_norm_rms_epsilon"),
            fields={**_LFM2, "block_auto_adjust_ff_dim": fixed(False)},
        ),
    ),
    "lfm2moe": (
        Architecture(
            model=("lfm2_moe", "Lfm2Moe"), mlp="feed_forward", names=_LFM2_NAMES,
            top={"token_embd_norm": "model.embedding_norm"}, rearrange=(convolution_channels,),
            epsilon=("norm_eps", "attention.layer_norm_rms_epsilon"),
            fields={
                **_LFM2, **_USED, **_EXPERT_WIDTH, "num_experts": count("expert_count"), "norm_topk_prob": fixed(True),
                "num_dense_layers": count("leading_dense_block_count", 0, 0),
                "routed_scaling_factor": number("expert_weights_scale", 1.0),
                "use_expert_bias": lambda meta: any(name.endswith(".exp_probs_b.bias") for name in meta.tensors),
            },
        ),
    ),
    "kimi-linear": (
        Architecture(
            model=("kimi_linear", "KimiLinear"), rest=kimi_config, rearrange=(split_kv_b, join_convolutions),
            names={
                **_LATENT, "ssm_f_a": "self_attn.forget_gate.f_a_proj", "ssm_f_b": "self_attn.forget_gate.f_b_proj",
                "ssm_g_a": "self_attn.g_a_proj", "ssm_g_b": "self_attn.g_b_proj", "ssm_beta": "self_attn.b_proj",
                "ssm_norm": "self_attn.o_norm", "ssm_a": "self_attn.forget_gate.A_log",
                "ssm_dt.bias": "self_attn.forget_gate.dt_bias", "ssm_conv1d_q": "self_attn.q_conv1d",
                "ssm_conv1d_k": "self_attn.k_conv1d", "ssm_conv1d_v": "self_attn.v_conv1d",
            },
            fields={"layer_types": recurrent("linear_attention", with_kv_heads), "num_key_value_heads": kv_heads},
        ),
    ),
}  # fmt: skip
