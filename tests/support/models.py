"""Small random models of every family, with Transformers' own logits to compare with.

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
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    YoutuConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from deepseek_optimizer.models import SUPPORTED

TOLERANCE = 1e-4  # of the row's largest logit, in fp32

# Families that the native backend runs; its tests take their cases from CASES by these prefixes.
NATIVE_FAMILIES = SUPPORTED


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{**_small(), **fields})


def qwen2(**fields: Any) -> Qwen2Config:
    return Qwen2Config(**{**_small(), **fields})


def qwen3(**fields: Any) -> Qwen3Config:
    return Qwen3Config(**{**_small(), "head_dim": 16, **fields})


def mistral(**fields: Any) -> MistralConfig:
    return MistralConfig(**{**_small(), "sliding_window": None, **fields})


def deepseek_v2(**fields: Any) -> DeepseekV2Config:
    return DeepseekV2Config(
        **{**_latent(), **_EXPERTS, "num_attention_heads": 6, "num_key_value_heads": None, "hidden_size": 72, **fields}
    )


def deepseek_v3(**fields: Any) -> DeepseekV3Config:
    experts = {"n_group": 3, "topk_group": 2, "n_shared_experts": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1}
    return DeepseekV3Config(**{**_latent(), **_EXPERTS, **experts, "num_attention_heads": 3, **fields})


def deepseek_v32(**fields: Any) -> DeepseekV32Config:
    """So many index heads because a key that all of them shun has a score of exactly 0, and several such are ties."""
    experts = {"n_group": 3, "topk_group": 2, "n_shared_experts": 1, "norm_topk_prob": True}
    index = {"index_topk": 16, "index_head_dim": 24, "index_n_heads": 20}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    return DeepseekV32Config(**{**_latent(), **_EXPERTS, **experts, **index, **heads, **fields})


def youtu(**fields: Any) -> YoutuConfig:
    heads = fields.get("num_attention_heads", 3)
    defaults = {**_latent(), "num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": True}
    return YoutuConfig(**{**defaults, **fields})


def lfm2(**fields: Any) -> Lfm2Config:
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
    defaults = {**_small(), "num_hidden_layers": 5, "layer_types": kinds, "norm_eps": 1e-5, "block_multiple_of": 24}
    return Lfm2Config(**{**defaults, **fields})


def qwen3_5_text(**fields: Any) -> Qwen3_5TextConfig:
    """All sizes of the delta nets differ, and none is a multiple of a vector."""
    sizes = {
        "head_dim": 24, "linear_num_key_heads": 3, "linear_key_head_dim": 20, "linear_num_value_heads": 6,
        "linear_value_head_dim": 18, "linear_conv_kernel_dim": 4, "num_hidden_layers": 4,
    }  # fmt: skip
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    return Qwen3_5TextConfig(**{**_small(), **sizes, "layer_types": kinds, **fields})


def _latent() -> dict[str, Any]:
    """Numbers of a head that turn, that do not, and of its value are all different, and no multiple of a tile."""
    return {
        **_small(), "num_key_value_heads": None, "kv_lora_rank": 40, "q_lora_rank": 28, "qk_nope_head_dim": 20,
        "qk_rope_head_dim": 12, "v_head_dim": 18,
    }  # fmt: skip


_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 12, "num_experts_per_tok": 4, "n_shared_experts": 2, "moe_intermediate_size": 44,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip


def native_cases() -> list[str]:
    """Names of the cases that the native backend runs."""
    return [name for name in CASES if name.split("-")[0] in NATIVE_FAMILIES]


def _small() -> dict[str, Any]:
    """Widths that are no multiple of a tile (16 rows, 32 columns), so that tails are met."""
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
    "qwen3_5_text-mixed": qwen3_5_text,
    "qwen3_5_text-equal": lambda: qwen3_5_text(
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_conv_kernel_dim=2,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
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
    "youtu-tied": youtu,
    "youtu-halves": lambda: youtu(
        rope_interleave=False, tie_word_embeddings=False, attention_bias=True, num_attention_heads=16
    ),
    "youtu-direct": lambda: youtu(q_lora_rank=None, num_attention_heads=20, **_YARN),
}


def random_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose weights, norms and biases are all random and of a size that makes every part count."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # grouped products want multiples of 16 bytes
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager).eval()
    return randomise(model, seed)


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> Any:
    """The module, with all its weights drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # of the size of the scores' own differences
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
    """Path of a parameter or buffer -> tensor; what `Backend.compile` takes."""
    return dict(model.state_dict())


def random_ids(config: Any, count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def transformers_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """float32 [T, V], from Transformers' own forward."""
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
