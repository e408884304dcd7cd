"""The families of models (`config.model_type`): what serving and training need to know of each besides its graph.

To add one, write its entry here and `models/<model_type>.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final


@dataclass(frozen=True, kw_only=True)
class Family:
    """Traits that cannot be read off a model's config or modules. The defaults are Llama's.

    Attributes:
        served: `models/<model_type>.py` builds its graph; otherwise it can only be trained with a `DeepSeekTrainer`.
        rotates_halves: RoPE rotates the first half of a head against the second (`train.modules.attention`).
        plain_residuals: decoder layers add what attention and MLP return, unscaled (`train.modules.layer`).
        plain_head: logits are the head's product, neither capped nor scaled, and the loss is Transformers' causal one
            (`train.modules.head`).
        window_from_config: all layers have `config.sliding_window`, and the attention modules don't have one of their own.
        interleaved_latents: Transformers' cache holds the rotated part of latent keys as interleaved pairs, as the plan's
            does; other families with latent attention move the pairs into halves first.
        separates_documents: without a mask and a cache, tokens do not attend across a place where `position_ids` start again.
    """

    served: bool = True
    rotates_halves: bool = True
    plain_residuals: bool = True
    plain_head: bool = True
    window_from_config: bool = False
    interleaved_latents: bool = False
    separates_documents: bool = True


# Training leaves attention and layers to Transformers.
_PLAN_ONLY: Final = Family(rotates_halves=False, plain_residuals=False)

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "deepseek_v2": Family(rotates_halves=False, interleaved_latents=True),
    "deepseek_v3": Family(rotates_halves=False),
    "deepseek_v32": Family(rotates_halves=False, plain_residuals=False),
    "deepseek_v4": _PLAN_ONLY,
    "youtu": Family(rotates_halves=False, plain_residuals=False),
    "mistral": Family(window_from_config=True),
    "ministral": _PLAN_ONLY,
    "ministral3": _PLAN_ONLY,
    "mistral4": _PLAN_ONLY,
    "smollm3": _PLAN_ONLY,
    "olmo2": _PLAN_ONLY,
    "olmo3": _PLAN_ONLY,
    "phi3": _PLAN_ONLY,
    "glm": _PLAN_ONLY,
    "glm4": _PLAN_ONLY,
    "granite": replace(_PLAN_ONLY, plain_head=False),
    "gemma": _PLAN_ONLY,
    "gemma2": replace(_PLAN_ONLY, plain_head=False),
    "gemma3_text": replace(_PLAN_ONLY, plain_head=False),
    "gemma4_text": replace(_PLAN_ONLY, plain_head=False),
    "gemma4_unified_text": replace(_PLAN_ONLY, plain_head=False),
    "ernie4_5": _PLAN_ONLY,
    "exaone4": _PLAN_ONLY,
    "seed_oss": _PLAN_ONLY,
    "hunyuan_v1_dense": _PLAN_ONLY,
    "stablelm": _PLAN_ONLY,
    "starcoder2": _PLAN_ONLY,
    "cohere2": replace(_PLAN_ONLY, plain_head=False),
    "mixtral": _PLAN_ONLY,
    "qwen2_moe": _PLAN_ONLY,
    "qwen3_moe": _PLAN_ONLY,
    "glm4_moe": _PLAN_ONLY,
    "glm4_moe_lite": _PLAN_ONLY,
    "glm_moe_dsa": _PLAN_ONLY,
    "llama4_text": _PLAN_ONLY,
    "minimax_m2": _PLAN_ONLY,
    "gpt_oss": replace(_PLAN_ONLY, separates_documents=False),
    "granitemoe": replace(_PLAN_ONLY, plain_head=False),
    "lfm2": _PLAN_ONLY,
    "lfm2_moe": _PLAN_ONLY,
    "kimi_linear": _PLAN_ONLY,
    "qwen3_next": _PLAN_ONLY,
    "qwen3_5_text": _PLAN_ONLY,
    "qwen3_5_moe_text": _PLAN_ONLY,
})  # fmt: skip
SUPPORTED: Final = tuple(name for name, family in FAMILIES.items() if family.served)

# Encoders, which have a plan for hidden states, and neither a cache nor a language model head in it.
ENCODERS: Final = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert")

_UNKNOWN: Final = Family(served=False, rotates_halves=False, plain_residuals=False, plain_head=False)


def traits(config: Any) -> Family:
    """The traits of a Transformers config's family; of an unknown one none, so that Transformers' own code is used for it."""
    return FAMILIES.get(getattr(config, "model_type", None) or "", _UNKNOWN)
