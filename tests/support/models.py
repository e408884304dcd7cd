"""Small random models of every family, with Transformers' logits for comparison.

model = random_model(CASES["qwen3-gqa"]())
graph = build_graph(model.config)
plan = backend.compile(graph, weights_of(model))
assert_close_rows(logits_of(plan, store, ids), transformers_logits(model, ids))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GlmMoeDsaConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HunYuanDenseV1Config,
    KimiLinearConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MinistralConfig,
    Mistral4Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    YoutuConfig,
)

from deepseek_optimizer.integration.compat import causal_lm_class
from deepseek_optimizer.models import SUPPORTED

TOLERANCE = 1e-4  # relative to the row's largest logit, in fp32

# Families that the native backend supports; its tests select their cases from CASES by these prefixes.
NATIVE_FAMILIES = SUPPORTED


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{**_small(), **fields})


def qwen2(**fields: Any) -> Qwen2Config:
    return Qwen2Config(**{**_small(), **fields})


def qwen3(**fields: Any) -> Qwen3Config:
    return Qwen3Config(**{**_small(), "head_dim": 16, **fields})


def mistral(**fields: Any) -> MistralConfig:
    return MistralConfig(**{**_small(), "sliding_window": None, **fields})


def smollm3(**fields: Any) -> SmolLM3Config:
    return SmolLM3Config(**{**_small(), "num_hidden_layers": 4, **fields})


def olmo2(**fields: Any) -> Olmo2Config:
    return Olmo2Config(**{**_small(), **fields})


def olmo3(**fields: Any) -> Olmo3Config:
    return Olmo3Config(**{**_small(), "num_hidden_layers": 4, "sliding_window": 37, **fields})


def phi3(**fields: Any) -> Phi3Config:
    return Phi3Config(**{**_small(), "original_max_position_embeddings": 256, **fields})


def glm(**fields: Any) -> GlmConfig:
    return GlmConfig(**{**_small(), "head_dim": 20, **fields})


def glm4(**fields: Any) -> Glm4Config:
    return Glm4Config(**{**_small(), "head_dim": 20, **fields})


def granite(**fields: Any) -> GraniteConfig:
    factors = {"embedding_multiplier": 1.7, "attention_multiplier": 0.3, "residual_multiplier": 0.6, "logits_scaling": 3.0}
    return GraniteConfig(**{**_small(), **factors, **fields})


def gemma(**fields: Any) -> GemmaConfig:
    return GemmaConfig(**{**_small(), "head_dim": 20, "tie_word_embeddings": True, **fields})


def gemma2(**fields: Any) -> Gemma2Config:
    limits = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 24}
    return Gemma2Config(**{**_small(), "head_dim": 20, "sliding_window": 37, **limits, **fields})


def gemma3_text(**fields: Any) -> Gemma3TextConfig:
    sizes = {"num_hidden_layers": 4, "head_dim": 20, "sliding_window": 37, "query_pre_attn_scalar": 24}
    return Gemma3TextConfig(**{**_small(), **sizes, "sliding_window_pattern": 3, **fields})


def gemma4_text(**fields: Any) -> Gemma4TextConfig:
    """Like the dense checkpoints: values of full layers are keys, whose heads are wide. Heads of the two types of layers differ
    in number and size."""
    sizes = {
        "num_hidden_layers": 4, "head_dim": 20, "sliding_window": 37, "global_head_dim": 44, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    return Gemma4TextConfig(**{**_small(), **sizes, **fields})


def gemma4_shared(**fields: Any) -> Gemma4TextConfig:
    """Like E2B: embeddings per layer, and layers that read the keys and values of others."""
    sizes = {
        "num_hidden_layers": 6, "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 12,
        "vocab_size_per_layer_input": 223, "attention_k_eq_v": False,
    }  # fmt: skip
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return gemma4_text(**{**sizes, "layer_types": [*kinds, kinds[0], kinds[0], kinds[1]], **fields})


def gemma4_moe(**fields: Any) -> Gemma4TextConfig:
    experts = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 44}
    return gemma4_text(**{**experts, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], **fields})


def gemma4_unified_text(**fields: Any) -> Gemma4UnifiedTextConfig:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    sizes = {
        "num_hidden_layers": 4, "head_dim": 20, "sliding_window": 37, "global_head_dim": 44, "num_kv_shared_layers": 2,
        "layer_types": kinds,
    }  # fmt: skip
    return Gemma4UnifiedTextConfig(**{**_small(), **sizes, **fields})


def ernie4_5(**fields: Any) -> Ernie4_5Config:
    return Ernie4_5Config(**{**_small(), "head_dim": 20, **fields})


def exaone4(**fields: Any) -> Exaone4Config:
    return Exaone4Config(**{**_small(), "head_dim": 20, "sliding_window": 37, "sliding_window_pattern": 2, **fields})


def seed_oss(**fields: Any) -> SeedOssConfig:
    return SeedOssConfig(**{**_small(), "head_dim": 20, **fields})


def hunyuan_v1_dense(**fields: Any) -> HunYuanDenseV1Config:
    return HunYuanDenseV1Config(**{**_small(), "head_dim": 20, **fields})


def ministral(**fields: Any) -> MinistralConfig:
    return MinistralConfig(**{**_small(), "head_dim": 12, "sliding_window": 37, **fields})


def ministral3(**fields: Any) -> Ministral3Config:
    """The queries' factor changes several times within the tests' texts."""
    return Ministral3Config(**{**_small(), "head_dim": 12, **_growing(1.0), **fields})


def mistral4(**fields: Any) -> Mistral4Config:
    experts = {"n_group": 3, "topk_group": 2, "n_shared_experts": 1, "norm_topk_prob": True}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    return Mistral4Config(**{**_latent(), **_EXPERTS, **experts, **heads, **_growing(1.0), **fields})


def _growing(scale: float) -> dict[str, Any]:
    return rope(
        "yarn", factor=64.0, original_max_position_embeddings=19, mscale=scale, mscale_all_dim=scale, llama_4_scaling_beta=0.4
    )


def stablelm(**fields: Any) -> StableLmConfig:
    return StableLmConfig(**{**_small(), "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, **fields})


def starcoder2(**fields: Any) -> Starcoder2Config:
    return Starcoder2Config(**{**_small(), **fields})


def cohere2(**fields: Any) -> Cohere2Config:
    return Cohere2Config(**{**_small(), "num_hidden_layers": 4, "sliding_window": 37, "logit_scale": 0.3, **fields})


def mixtral(**fields: Any) -> MixtralConfig:
    return MixtralConfig(**{**_small(), "intermediate_size": 44, "num_local_experts": 6, "num_experts_per_tok": 2, **fields})


def qwen2_moe(**fields: Any) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(**{**_small(), **_PLAIN_EXPERTS, "shared_expert_intermediate_size": 52, **fields})


def qwen3_moe(**fields: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**{**_small(), **_PLAIN_EXPERTS, "head_dim": 16, **fields})


def glm4_moe(**fields: Any) -> Glm4MoeConfig:
    experts = {"n_group": 3, "topk_group": 2, "n_shared_experts": 1, "norm_topk_prob": True, "num_mtp_layers": 0}
    return Glm4MoeConfig(**{**_small(), **_EXPERTS, **experts, "head_dim": 20, **fields})


def glm4_moe_lite(**fields: Any) -> Glm4MoeLiteConfig:
    experts = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    return Glm4MoeLiteConfig(**{**_latent(), **_EXPERTS, **experts, **heads, **fields})


def minimax_m2(**fields: Any) -> MiniMaxM2Config:
    experts = {"intermediate_size": 44, "num_local_experts": 6, "num_experts_per_tok": 2}
    return MiniMaxM2Config(**{**_small(), **experts, "head_dim": 20, **fields})


def gpt_oss(**fields: Any) -> GptOssConfig:
    experts = {"intermediate_size": 44, "num_local_experts": 6, "num_experts_per_tok": 2}
    scaled = rope("yarn", factor=32.0, original_max_position_embeddings=128, beta_fast=32.0, beta_slow=1.0, truncate=False)
    return GptOssConfig(**{**_small(), **experts, **scaled, "head_dim": 20, "sliding_window": 37, **fields})


def granitemoe(**fields: Any) -> GraniteMoeConfig:
    factors = {"embedding_multiplier": 1.7, "attention_multiplier": 0.3, "residual_multiplier": 0.6, "logits_scaling": 3.0}
    experts = {"intermediate_size": 44, "num_local_experts": 6, "num_experts_per_tok": 2}
    return GraniteMoeConfig(**{**_small(), **factors, **experts, **fields})


def deepseek_v2(**fields: Any) -> DeepseekV2Config:
    return DeepseekV2Config(
        **{**_latent(), **_EXPERTS, "num_attention_heads": 6, "num_key_value_heads": None, "hidden_size": 72, **fields}
    )


def deepseek_v3(**fields: Any) -> DeepseekV3Config:
    experts = {"n_group": 3, "topk_group": 2, "n_shared_experts": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1}
    return DeepseekV3Config(**{**_latent(), **_EXPERTS, **experts, "num_attention_heads": 3, **fields})


def deepseek_v32(**fields: Any) -> DeepseekV32Config:
    """With fewer index heads, several keys would get a score of exactly 0 from all heads, which are ties."""
    experts = {"n_group": 3, "topk_group": 2, "n_shared_experts": 1, "norm_topk_prob": True}
    index = {"index_topk": 16, "index_head_dim": 24, "index_n_heads": 20}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    return DeepseekV32Config(**{**_latent(), **_EXPERTS, **experts, **index, **heads, **fields})


def glm_moe_dsa(**fields: Any) -> GlmMoeDsaConfig:
    """With as many index heads as in `deepseek_v32`; layers 2 and 3 use the tokens that layer 1 chose."""
    experts = {"n_group": 3, "topk_group": 2, "n_shared_experts": 1, "norm_topk_prob": True}
    index = {"index_topk": 16, "index_head_dim": 24, "index_n_heads": 20, "indexer_types": ["full", "full", "shared", "shared"]}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 4}
    return GlmMoeDsaConfig(**{**_latent(), **_EXPERTS, **experts, **index, **heads, **fields})


def llama4_text(**fields: Any) -> Llama4TextConfig:
    """Layers with chunks, experts, full attention and growing queries in all combinations; chunks end within blocks."""
    experts = {"intermediate_size": 44, "intermediate_size_mlp": 136, "num_local_experts": 6, "num_experts_per_tok": 2}
    sizes = {"num_hidden_layers": 4, "head_dim": 20, "attention_chunk_size": 27, "no_rope_layers": [1, 0, 1, 0]}
    scales = {"floor_scale": 13, "attn_scale": 0.4}
    return Llama4TextConfig(**{**_small(), **experts, **sizes, **scales, "interleave_moe_layer_step": 2, **fields})


def youtu(**fields: Any) -> YoutuConfig:
    heads = fields.get("num_attention_heads", 3)
    defaults = {**_latent(), "num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": True}
    return YoutuConfig(**{**defaults, **fields})


def lfm2(**fields: Any) -> Lfm2Config:
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
    defaults = {**_small(), "num_hidden_layers": 5, "layer_types": kinds, "norm_eps": 1e-5, "block_multiple_of": 24}
    return Lfm2Config(**{**defaults, **fields})


def lfm2_moe(**fields: Any) -> Lfm2MoeConfig:
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
    experts = {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "num_dense_layers": 2}
    defaults = {**_small(), **experts, "num_hidden_layers": 5, "layer_types": kinds, "norm_eps": 1e-5}
    return Lfm2MoeConfig(**{**defaults, **fields})


def qwen3_5_text(**fields: Any) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(**{**_small(), **_delta_nets(), **fields})


def qwen3_5_moe_text(**fields: Any) -> Qwen3_5MoeTextConfig:
    return Qwen3_5MoeTextConfig(**{**_small(), **_delta_nets(), **_QWEN_EXPERTS, **fields})


def qwen3_next(**fields: Any) -> Qwen3NextConfig:
    return Qwen3NextConfig(**{**_small(), **_delta_nets(), **_QWEN_EXPERTS, **fields})


def kimi_linear(**fields: Any) -> KimiLinearConfig:
    experts = {
        "num_local_experts": 12, "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 44, "n_group": 3,
        "topk_group": 2, "norm_topk_prob": True, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }  # fmt: skip
    sizes = {"linear_head_dim": 20, "linear_num_heads": 3, "num_hidden_layers": 4, "num_attention_heads": 3}
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    return KimiLinearConfig(
        **{**_latent(), **experts, **sizes, "q_lora_rank": None, "num_key_value_heads": 3, "layer_types": kinds, **fields}
    )


_QWEN_EXPERTS = {
    "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "shared_expert_intermediate_size": 52,
}  # fmt: skip


def _delta_nets() -> dict[str, Any]:
    """All sizes of the delta nets differ, and none is a multiple of a vector."""
    sizes = {
        "head_dim": 24, "linear_num_key_heads": 3, "linear_key_head_dim": 20, "linear_num_value_heads": 6,
        "linear_value_head_dim": 18, "linear_conv_kernel_dim": 4, "num_hidden_layers": 4,
    }  # fmt: skip
    return {**sizes, "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}


def _latent() -> dict[str, Any]:
    """Rotated and unrotated elements of a head and its value have different sizes, none a multiple of a tile."""
    return {
        **_small(), "num_key_value_heads": None, "kv_lora_rank": 40, "q_lora_rank": 28, "qk_nope_head_dim": 20,
        "qk_rope_head_dim": 12, "v_head_dim": 18,
    }  # fmt: skip


_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 12, "num_experts_per_tok": 4, "n_shared_experts": 2, "moe_intermediate_size": 44,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip


_PLAIN_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 44}


def native_cases() -> list[str]:
    """Names of the cases that the native backend supports."""
    return [name for name in CASES if name.split("-")[0] in NATIVE_FAMILIES]


def _small() -> dict[str, Any]:
    """Widths that are not multiples of a tile (16 rows, 32 columns), so that remainders are tested."""
    return {
        "vocab_size": 211, "hidden_size": 72, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_YARN = rope(
    "yarn", factor=32.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1
)
_LITE = rope("yarn", factor=32.0, original_max_position_embeddings=128, mscale=0.707, mscale_all_dim=0.707)
_UNEQUAL = rope("yarn", factor=4.0, original_max_position_embeddings=1024, mscale=0.5, mscale_all_dim=0.8)
_LIMITED = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1}
_LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)

# name -> a fresh config. Names start with the family.
CASES: dict[str, Callable[[], Any]] = {
    "llama-gqa": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-mha": lambda: llama(num_key_value_heads=None),
    "llama-mqa": lambda: llama(num_key_value_heads=1),
    "llama-wide-heads": lambda: llama(head_dim=20),
    "llama-one-layer": lambda: llama(num_hidden_layers=1),
    "llama-linear": lambda: llama(**rope("linear", factor=4.0)),
    "llama-dynamic": lambda: llama(**rope("dynamic", factor=4.0)),
    "llama-yarn": lambda: llama(**rope("yarn", factor=4.0, original_max_position_embeddings=1024)),
    "llama-llama3": lambda: llama(**_LLAMA3),
    "qwen2-gqa": qwen2,
    "qwen2-tied": lambda: qwen2(tie_word_embeddings=True),
    "qwen2-windows": lambda: qwen2(**_WINDOWS),
    "qwen2-yarn": lambda: qwen2(**rope("yarn", factor=4.0, original_max_position_embeddings=1024)),
    "qwen3-gqa": qwen3,
    "qwen3-tied": lambda: qwen3(tie_word_embeddings=True),
    "qwen3-biases": lambda: qwen3(attention_bias=True),
    "qwen3-windows": lambda: qwen3(**_WINDOWS),
    "qwen3-layer-types": lambda: qwen3(
        use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "mistral-gqa": mistral,
    "mistral-tied-window": lambda: mistral(tie_word_embeddings=True, sliding_window=37),
    "lfm2-mixed": lfm2,
    "lfm2-biases": lambda: lfm2(conv_bias=True, conv_L_cache=4, tie_word_embeddings=False, block_auto_adjust_ff_dim=False),
    "lfm2-aligned": lambda: lfm2(hidden_size=96),
    "lfm2_moe-experts": lambda: lfm2_moe(routed_scaling_factor=1.7),
    "lfm2_moe-unbiased": lambda: lfm2_moe(use_expert_bias=False, norm_topk_prob=False, num_dense_layers=0),
    "kimi_linear-experts": kimi_linear,
    "qwen3_next-experts": qwen3_next,
    "qwen3_next-steps": lambda: qwen3_next(decoder_sparse_step=2, norm_topk_prob=False, linear_num_key_heads=6),
    "qwen3_5_moe_text-experts": qwen3_5_moe_text,
    "qwen3_5_text-mixed": qwen3_5_text,
    "qwen3_5_text-equal": lambda: qwen3_5_text(
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_conv_kernel_dim=2,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "ministral-types": lambda: ministral(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "ministral3-growing": ministral3,
    "ministral3-window": lambda: ministral3(sliding_window=37, tie_word_embeddings=True),
    "mistral4-groups": mistral4,
    "mistral4-halves": lambda: mistral4(rope_interleave=False, norm_topk_prob=False, q_lora_rank=None, attention_bias=True),
    "smollm3-nope": lambda: smollm3(mlp_bias=True),
    "smollm3-windows": lambda: smollm3(use_sliding_window=True, sliding_window=37, no_rope_layers=[1, 0, 0, 1]),
    "olmo2-gqa": olmo2,
    "olmo3-types": olmo3,
    "olmo3-scaled": lambda: olmo3(
        rope_parameters={"full_attention": _YARN["rope_parameters"], "sliding_attention": rope("default")["rope_parameters"]}
    ),
    "phi3-window": lambda: phi3(sliding_window=37),
    "phi3-aligned": lambda: phi3(hidden_size=96, intermediate_size=128),
    "phi3-longrope": lambda: phi3(
        **rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.4, 1.6], long_factor=[1.5, 2.0, 3.0, 5.0, 9.0]),
        partial_rotary_factor=0.84,
    ),
    "glm-partial": glm,
    "glm4-partial": glm4,
    "granite-factors": granite,
    "gemma-tied": gemma,
    "gemma2-limits": gemma2,
    "gemma3_text-two-ropes": gemma3_text,
    "gemma4_text-dense": gemma4_text,
    "gemma4_text-shared": gemma4_shared,
    "gemma4_text-experts": lambda: gemma4_moe(attention_bias=True),
    "gemma4_unified_text-shared": gemma4_unified_text,
    "ernie4_5-biases": lambda: ernie4_5(use_bias=True),
    "exaone4-types": exaone4,
    "exaone4-global": lambda: exaone4(sliding_window=None, layer_types=["full_attention"] * 3),
    "seed_oss-biases": lambda: seed_oss(attention_out_bias=True, mlp_bias=True),
    "hunyuan_v1_dense-alpha": lambda: hunyuan_v1_dense(**rope("dynamic", factor=1.0, alpha=1000.0)),
    "stablelm-partial": lambda: stablelm(use_qkv_bias=True),
    "stablelm-parallel": lambda: stablelm(use_parallel_residual=True),
    "starcoder2-window": lambda: starcoder2(sliding_window=37),
    "cohere2-types": cohere2,
    "mixtral-window": lambda: mixtral(sliding_window=37),
    "qwen2_moe-shared": qwen2_moe,
    "qwen2_moe-steps": lambda: qwen2_moe(norm_topk_prob=True, decoder_sparse_step=2, qkv_bias=False, mlp_only_layers=[0]),
    "qwen3_moe-plain": qwen3_moe,
    "qwen3_moe-normalized": lambda: qwen3_moe(norm_topk_prob=True, use_sliding_window=True, sliding_window=37),
    "glm4_moe-groups": lambda: glm4_moe(use_qk_norm=True, attention_bias=True),
    "glm4_moe_lite-latent": glm4_moe_lite,
    "minimax_m2-partial": lambda: minimax_m2(rotary_dim=12),
    "granitemoe-factors": granitemoe,
    "gpt_oss-sinks": gpt_oss,
    "gpt_oss-limits": lambda: gpt_oss(swiglu_limit=0.7, swiglu_alpha=1.3, attention_bias=False, num_hidden_layers=2),
    "deepseek_v2-greedy": lambda: deepseek_v2(q_lora_rank=None, **_LITE),
    "deepseek_v2-groups": lambda: deepseek_v2(**_LIMITED),
    "deepseek_v2-biases": lambda: deepseek_v2(attention_bias=True, mlp_bias=True, hidden_size=80, num_attention_heads=16),
    "deepseek_v2-dense": lambda: deepseek_v2(first_k_dense_replace=3, **_UNEQUAL),
    "deepseek_v3-groups": lambda: deepseek_v3(**_YARN),
    "deepseek_v3-direct": lambda: deepseek_v3(q_lora_rank=None, num_experts_per_tok=3, tie_word_embeddings=True),
    "deepseek_v3-halves": lambda: deepseek_v3(rope_interleave=False, norm_topk_prob=False, num_attention_heads=20),
    "deepseek_v3-biases": lambda: deepseek_v3(attention_bias=True, n_group=1, topk_group=1, num_experts_per_tok=2),
    "deepseek_v32-indexer": lambda: deepseek_v32(**_YARN),
    "deepseek_v32-types": lambda: deepseek_v32(
        mlp_layer_types=["sparse", "dense", "sparse"], attention_bias=True, index_topk=40
    ),
    "glm_moe_dsa-shared": glm_moe_dsa,
    "glm_moe_dsa-biases": lambda: glm_moe_dsa(
        attention_bias=True, index_topk=40, indexer_types=["full", "shared"], num_hidden_layers=2, **_YARN
    ),
    "llama4_text-chunks": llama4_text,
    "llama4_text-biases": lambda: llama4_text(
        attention_bias=True,
        use_qk_norm=False,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        attn_temperature_tuning=False,
        num_hidden_layers=2,
        no_rope_layers=[1, 0],
        **_LLAMA3,
    ),
    "youtu-tied": youtu,
    "youtu-halves": lambda: youtu(
        rope_interleave=False, tie_word_embeddings=False, attention_bias=True, num_attention_heads=16
    ),
    "youtu-direct": lambda: youtu(q_lora_rank=None, num_attention_heads=20, **_YARN),
}


def random_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose weights, norms and biases are random and large enough that every part affects the result."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # grouped products need multiples of 16 bytes
    model = causal_lm_class(type(config))._from_config(config, dtype=dtype, **eager).eval()
    return randomize(model, seed)


@torch.no_grad()
def randomize(model: Any, seed: int = 0) -> Any:
    """Replaces all weights of the module by random ones, and returns it."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.copy_(1 + torch.randn(buffer.shape, generator=generator) * 0.2)
        if name.endswith(("e_score_correction_bias", "expert_bias")):  # as large as the differences between scores
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):  # so that states decay slowly
            noise -= 16.0
        if "embed" in name:
            parameter.copy_(noise)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
    return model


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Path of a parameter or buffer -> tensor, as for `Backend.compile`."""
    return dict(model.state_dict())


def random_ids(config: Any, count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def transformers_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """float32 [T, V], from Transformers' forward."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


@torch.no_grad()
def transformers_hidden(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """float32 [layers + 1, T, H]."""
    output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return torch.stack([h[0].float() for h in output.hidden_states])


def assert_close_rows(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Per row, the largest difference is at most `tolerance` of the row's largest value. NaN fails."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
    if not (error <= tolerance).all():
        row = int(error.nan_to_num(nan=torch.inf).flatten().argmax())
        raise AssertionError(f"row {row}: {error.flatten()[row]:.3g} of the largest value, allowed {tolerance:g}")
