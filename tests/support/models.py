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
from transformers import PreTrainedModel

from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.integration.compat import causal_lm_class
from deepseek_optimizer.models import SUPPORTED
from support.family_configs import (
    cohere2,
    deepseek_v2,
    deepseek_v3,
    deepseek_v4,
    deepseek_v32,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3_text,
    gemma4_moe,
    gemma4_shared,
    gemma4_text,
    gemma4_unified_text,
    glm,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    gpt_oss,
    granite,
    granitemoe,
    hunyuan_v1_dense,
    kimi_linear,
    lfm2,
    lfm2_moe,
    llama,
    llama4_text,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mistral4,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    rope,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    youtu,
)

TOLERANCE = 1e-4  # relative to the row's largest logit, in fp32

# Families that the native backend supports; its tests select their cases from CASES by these prefixes.
NATIVE_FAMILIES = SUPPORTED


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
    "deepseek_v4-mixed": deepseek_v4,
    "deepseek_v4-yarn": lambda: deepseek_v4(
        rope_parameters={"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32},
        index_head_dim=24,
        layer_types=["sliding_attention", "compressed_sparse_attention", "compressed_sparse_attention"],
        num_hidden_layers=3,
        mlp_layer_types=["moe", "hash_moe", "moe"],
        hc_mult=4,
        head_dim=64,
        qk_rope_head_dim=16,
        index_topk=64,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 40},
        scoring_func="sigmoid",
    ),
    "deepseek_v4-heavy": lambda: deepseek_v4(
        layer_types=["heavily_compressed_attention"] * 2,
        num_hidden_layers=2,
        mlp_layer_types=["moe", "moe"],
        hc_mult=2,
        compress_rates={"heavily_compressed_attention": 40},
        tie_word_embeddings=True,
        sliding_window=5,
    ),
    "youtu-halves": lambda: youtu(
        rope_interleave=False, tie_word_embeddings=False, attention_bias=True, num_attention_heads=16
    ),
    "youtu-direct": lambda: youtu(q_lora_rank=None, num_attention_heads=20, **_YARN),
}


def native_cases() -> list[str]:
    """Names of the cases that the native backend supports."""
    return [name for name in CASES if name.split("-")[0] in NATIVE_FAMILIES]


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
        if name.endswith("tid2eid"):  # distinct experts for each token
            experts = model.config.num_local_experts
            orders = [torch.randperm(experts, generator=generator) for _ in range(len(buffer))]
            buffer.copy_(torch.stack(orders)[:, : buffer.shape[1]])
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
    """float32 [layers + 1, T, H]; with hyper-connections only that after the final norm, [1, T, H]."""
    output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return torch.stack([h[0].float() for h in output.hidden_states if h.ndim == 3])


def assert_close_rows(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Per row, the largest difference is at most `tolerance` of the row's largest value. NaN fails."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
    if not (error <= tolerance).all():
        row = int(error.nan_to_num(nan=torch.inf).flatten().argmax())
        raise AssertionError(f"row {row}: {error.flatten()[row]:.3g} of the largest value, allowed {tolerance:g}")


def random_weights(graph: Any, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of a graph, such as that of an MTP layer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in weight_shapes(graph).items():
        noise = torch.randn(shape, generator=generator)
        made[name] = noise * shape[-1] ** -0.5 if len(shape) > 1 else noise * 0.2 + (0.0 if "bias" in name else 1.0)
    return made
