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
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

TOLERANCE = 1e-4  # of the row's largest logit, in fp32


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{**_small(), **fields})


def qwen2(**fields: Any) -> Qwen2Config:
    return Qwen2Config(**{**_small(), **fields})


def qwen3(**fields: Any) -> Qwen3Config:
    return Qwen3Config(**{**_small(), "head_dim": 16, **fields})


def _small() -> dict[str, Any]:
    """Widths that are no multiple of a tile (16 rows, 32 columns), so that tails are met."""
    return {
        "vocab_size": 211, "hidden_size": 72, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


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
}


def random_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose weights, norms and biases are all random and of a size that makes every part count."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
    return model


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameter path -> tensor; what `Backend.compile` takes."""
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
