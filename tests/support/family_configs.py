"""Configs of every family for small models: sizes that no kernel divides evenly, so that remainders are tested."""

from __future__ import annotations

from typing import Any

from transformers import (
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV4Config,
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


def deepseek_v4(**fields: Any) -> DeepseekV4Config:
    """All types of layers, with windows of 3 and 7 tokens that no block is a multiple of."""
    sizes = {
        "vocab_size": 211, "hidden_size": 72, "moe_intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 6,
        "head_dim": 20, "qk_rope_head_dim": 6, "q_lora_rank": 40, "o_groups": 3, "o_lora_rank": 14, "sliding_window": 21,
        "max_position_embeddings": 512, "hc_mult": 3, "hc_sinkhorn_iters": 5, "eos_token_id": None,
    }  # fmt: skip
    experts = {"n_routed_experts": 6, "num_experts_per_tok": 2, "swiglu_limit": 1.5}
    index = {"index_topk": 9, "index_head_dim": 12, "index_n_heads": 20}
    types = ("compressed_sparse", "heavily_compressed", "sliding", "compressed_sparse")
    kinds = {
        "layer_types": [f"{kind}_attention" for kind in types],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "hash_moe"],
        "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 7},
    }  # fmt: skip
    return DeepseekV4Config(**{**sizes, **experts, **index, **kinds, **fields})


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


def _small() -> dict[str, Any]:
    """Widths that are not multiples of a tile (16 rows, 32 columns), so that remainders are tested."""
    return {
        "vocab_size": 211, "hidden_size": 72, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}
