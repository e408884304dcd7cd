"""GGUF files of small random models of every family.

case = CASES["gemma2"]
model = random_model(case.config())
write_gguf(path, case, model, "Q8_0")
"""

from __future__ import annotations

from typing import Any

from . import models as m
from .gguf_converter import (
    Case,
    delta,
    delta_keys,
    experts_keys,
    gemma4,
    gemma4_frequencies,
    gemma4_keys,
    glm_indexed_keys,
    glm_moe_keys,
    granite_keys,
    indexed_keys,
    kimi,
    kimi_keys,
    latent,
    latent_keys,
    lfm2_keys,
    lfm2_width,
    llama3_factors,
    llama4,
    llama4_keys,
    llama_keys,
    long_factors,
    ministral3_keys,
    mistral4,
    mistral4_keys,
    permuted,
    phi3_keys,
    plus_one,
    rotated,
    short_conv,
    stablelm_keys,
    tiled,
    window,
)

# Rows are multiples of 32 elements, so that Q8_0 can store them.
_WIDE = {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 224}
_MOE = {**_WIDE, "moe_intermediate_size": 64}
_QWEN_MOE = {**_MOE, "shared_expert_intermediate_size": 96}
_SMALL_MOE = {**_WIDE, "intermediate_size": 64}
_LATENT = {"qk_nope_head_dim": 32, "kv_lora_rank": 64, "v_head_dim": 32, "qk_rope_head_dim": 16}
_HYBRID = {"head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2}
_EVEN, _ODD = [1.0, 1.1, 1.2, 1.4, 1.6, 1.7, 1.8, 1.9], [1.5, 2.0, 3.0, 5.0, 9.0, 10.0, 11.0, 12.0]
_GEMMA4 = {**_WIDE, "head_dim": 32, "global_head_dim": 64}
_LLAMA4 = {
    **_WIDE, "head_dim": 32, "intermediate_size": 64, "intermediate_size_mlp": 160, "attention_chunk_size": 8192,
    "floor_scale": 8192, "attn_scale": 0.1,
}  # fmt: skip
_KIMI = {**_MOE, **_LATENT, "n_group": 1, "topk_group": 1, "linear_head_dim": 32}


def _growing(all_dim: float, beta: float = 0.4) -> dict[str, Any]:
    return m.rope(
        "yarn", factor=64.0, original_max_position_embeddings=19, mscale=1.0, mscale_all_dim=all_dim, beta_fast=32.0,
        beta_slow=1.0, llama_4_scaling_beta=beta,
    )  # fmt: skip


CASES: dict[str, Case] = {
    "llama": Case(
        "llama", lambda: m.llama(**_WIDE, head_dim=20, attention_bias=True, mlp_bias=True), llama_keys, permuted,
    ),
    "llama-llama3": Case(
        "llama",
        lambda: m.llama(
            **_WIDE, tie_word_embeddings=True,
            **m.rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        ),
        llama_keys, permuted, llama3_factors,
    ),
    "llama4": Case(
        "llama4",
        lambda: m.llama4_text(
            **_LLAMA4, no_rope_layers=[1, 1, 1, 0],
            **m.rope("llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192),
        ),
        llama4_keys, llama4, llama3_factors,
    ),
    "llama4-full": Case(
        "llama4",
        lambda: m.llama4_text(
            **_LLAMA4, no_rope_layers=[1] * 4, layer_types=["full_attention"] * 4, attn_temperature_tuning=False,
            interleave_moe_layer_step=1, tie_word_embeddings=True,
        ),
        llama4_keys, llama4,
    ),
    "mistral": Case("llama", lambda: m.mistral(**_WIDE, head_dim=32), llama_keys, permuted),
    "mistral3": Case("mistral3", lambda: m.mistral(**_WIDE, head_dim=32), llama_keys, permuted),
    "ministral3": Case("mistral3", lambda: m.ministral3(**_WIDE, **_growing(1.0)), ministral3_keys, permuted),
    "ministral3-multiplier": Case("mistral3", lambda: m.ministral3(**_WIDE, **_growing(0.5)), ministral3_keys, permuted),
    "mistral4": Case(
        "mistral4", lambda: m.mistral4(**_MOE, **_LATENT, q_lora_rank=32, **_growing(1.0, 0.1)), mistral4_keys, mistral4,
    ),
    "mixtral": Case("llama", lambda: m.mixtral(**_SMALL_MOE), llama_keys, permuted),
    "qwen2": Case("qwen2", lambda: m.qwen2(**_WIDE)),
    "qwen2_moe": Case("qwen2moe", lambda: m.qwen2_moe(**_QWEN_MOE), experts_keys),
    "qwen3": Case("qwen3", lambda: m.qwen3(**_WIDE)),
    "qwen3_moe": Case("qwen3moe", lambda: m.qwen3_moe(**_MOE, norm_topk_prob=True), experts_keys),
    "qwen3_next": Case("qwen3next", lambda: m.qwen3_next(**_QWEN_MOE, **_HYBRID), delta_keys, delta),
    "qwen3_5": Case(
        "qwen35", lambda: m.qwen3_5_text(**_WIDE, **_HYBRID),
        lambda c: {**delta_keys(c), "rope.dimension_sections": [2, 1, 1, 0]}, tiled,
    ),
    "qwen3_5-equal-heads": Case(
        "qwen35",
        lambda: m.qwen3_5_text(
            **_WIDE, **{**_HYBRID, "linear_num_value_heads": 2}, layer_types=["linear_attention", "full_attention"] * 2
        ),
        lambda c: {
            **delta_keys(c), "rope.dimension_sections": [2, 1, 1, 0], "attention.recurrent_layers": None,
            "full_attention_interval": 2,
        },
        tiled,
    ),
    "qwen3_5_moe": Case(
        "qwen35moe", lambda: m.qwen3_5_moe_text(**_QWEN_MOE, **_HYBRID),
        lambda c: {**delta_keys(c), "rope.dimension_sections": [2, 1, 1, 0]}, tiled,
    ),
    "gemma": Case("gemma", lambda: m.gemma(**_WIDE), lambda c: {"rope.freq_base": None}, plus_one),
    "gemma2": Case(
        "gemma2", lambda: m.gemma2(**_WIDE, query_pre_attn_scalar=20),
        lambda c: {
            "rope.freq_base": None, "attn_logit_softcapping": c.attn_logit_softcapping,
            "final_logit_softcapping": c.final_logit_softcapping, "attention.sliding_window": c.sliding_window,
        },
        plus_one,
    ),
    "gemma3": Case(
        "gemma3", lambda: m.gemma3_text(**_WIDE, query_pre_attn_scalar=20, num_hidden_layers=7, sliding_window_pattern=6),
        lambda c: {"attention.sliding_window": c.sliding_window}, plus_one,
    ),
    "gemma4": Case("gemma4", lambda: m.gemma4_text(**_GEMMA4), gemma4_keys, gemma4, gemma4_frequencies),
    "gemma4-shared": Case(
        "gemma4", lambda: m.gemma4_shared(**_GEMMA4, hidden_size_per_layer_input=32, vocab_size_per_layer_input=224),
        gemma4_keys, gemma4, gemma4_frequencies,
    ),
    "gemma4-experts": Case(
        "gemma4", lambda: m.gemma4_moe(**_GEMMA4, moe_intermediate_size=64), gemma4_keys, gemma4, gemma4_frequencies,
    ),
    "phi3": Case("phi3", lambda: m.phi3(**_WIDE, sliding_window=37), phi3_keys),
    "phi3-longrope": Case(
        "phi3", lambda: m.phi3(**_WIDE, **m.rope("longrope", short_factor=_EVEN, long_factor=_ODD)), phi3_keys,
        extra=long_factors,
    ),
    "glm": Case(
        "chatglm", lambda: m.glm(**_WIDE, head_dim=16),
        lambda c: {**rotated(c), "attention.key_length": None, "attention.value_length": None},
    ),
    "glm4": Case("glm4", lambda: m.glm4(**_WIDE), rotated),
    "glm4_moe": Case("glm4moe", lambda: m.glm4_moe(**_MOE, use_qk_norm=True, attention_bias=True), glm_moe_keys),
    "glm4_moe_lite": Case(
        "deepseek2", lambda: m.glm4_moe_lite(**_MOE, **_LATENT, q_lora_rank=32),
        lambda c: {**latent_keys(c), "expert_weights_norm": True}, latent,
    ),
    "glm_moe_dsa": Case("glm-dsa", lambda: m.glm_moe_dsa(**_MOE, **_LATENT, q_lora_rank=32), glm_indexed_keys, latent),
    "deepseek_v32": Case(
        "deepseek32", lambda: m.deepseek_v32(**_MOE, **_LATENT, q_lora_rank=32), indexed_keys, latent, names="glm-dsa",
    ),
    "granite": Case("granite", lambda: m.granite(**_WIDE), granite_keys, permuted),
    "granitemoe": Case("granitemoe", lambda: m.granitemoe(**_SMALL_MOE), granite_keys, permuted),
    "olmo2": Case("olmo2", lambda: m.olmo2(**_WIDE)),
    "olmo3": Case(
        "olmo2",
        lambda: m.olmo3(
            **_WIDE,
            rope_parameters={
                "full_attention": m._YARN["rope_parameters"] | {"mscale": None, "mscale_all_dim": None},
                "sliding_attention": m.rope("default")["rope_parameters"],
            },
        ),
        window,
    ),
    "smollm3": Case("smollm3", lambda: m.smollm3(**_WIDE), llama_keys, permuted),
    "exaone4": Case("exaone4", lambda: m.exaone4(**_WIDE, head_dim=16), lambda c: {"vocab_size": c.vocab_size, **window(c)}),
    "exaone4-global": Case(
        "exaone4", lambda: m.exaone4(**_WIDE, head_dim=16, sliding_window=None, layer_types=["full_attention"] * 3),
        lambda c: {"vocab_size": c.vocab_size},
    ),
    "ernie4_5": Case("ernie4_5", lambda: m.ernie4_5(**_WIDE)),
    "seed_oss": Case("seed_oss", lambda: m.seed_oss(**_WIDE)),
    "hunyuan_v1_dense": Case(
        "hunyuan-dense", lambda: m.hunyuan_v1_dense(**_WIDE, **m.rope("dynamic", factor=1.0, alpha=1000.0)),
        lambda c: {
            "rope.freq_base": 10000.0 * 1000.0 ** (c.head_dim / (c.head_dim - 2)), "context_length": 262144,
            "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 262144,
        },
    ),
    "stablelm": Case(
        "stablelm", lambda: m.stablelm(**_WIDE, use_qkv_bias=True),
        stablelm_keys,
    ),
    "stablelm-parallel": Case(
        "stablelm", lambda: m.stablelm(**_WIDE, use_parallel_residual=True),
        stablelm_keys,
    ),
    "starcoder2": Case("starcoder2", lambda: m.starcoder2(**_WIDE)),
    "cohere2": Case(
        "cohere2", lambda: m.cohere2(**_WIDE),
        lambda c: {
            **llama_keys(c), "logit_scale": c.logit_scale, "attention.sliding_window": c.sliding_window,
            "rope.scaling.type": "none",
        },
    ),
    "minimax_m2": Case(
        "minimax-m2", lambda: m.minimax_m2(**_SMALL_MOE, rotary_dim=12),
        lambda c: {"expert_feed_forward_length": 64, "rope.dimension_count": 12, "expert_gating_func": 2},
    ),
    "lfm2": Case(
        "lfm2", lambda: m.lfm2(**_WIDE, block_multiple_of=32),
        lambda c: {**lfm2_keys(c), "feed_forward_length": lfm2_width(c)}, short_conv,
    ),
    "lfm2_moe": Case(
        "lfm2moe", lambda: m.lfm2_moe(**_MOE),
        lambda c: {
            **lfm2_keys(c), "expert_feed_forward_length": c.moe_intermediate_size, "expert_gating_func": 2,
            "leading_dense_block_count": c.num_dense_layers,
        },
        short_conv,
    ),
    "kimi_linear": Case("kimi-linear", lambda: m.kimi_linear(**_KIMI), kimi_keys, kimi),
}  # fmt: skip
