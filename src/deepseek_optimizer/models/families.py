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
        alone: Transformers has a causal language model of this family; otherwise it occurs only within multimodal models.
        separates_documents: without a mask and a cache, tokens do not attend across a place where `position_ids` start again.
        trains_drafts: a layer that drafts can be trained for a frozen model (`dso draft`): MTP layers take one hidden state per
            token.
        packs: documents can be trained in one row without an effect on each other. Not so where Transformers does not separate
            them, passes recurrent states from one to the next, or counts positions from the start of the row.
    """

    served: bool = True
    alone: bool = True
    rotates_halves: bool = True
    plain_residuals: bool = True
    plain_head: bool = True
    window_from_config: bool = False
    interleaved_latents: bool = False
    separates_documents: bool = True
    trains_drafts: bool = True
    packs: bool = True


# Training leaves attention and layers to Transformers.
_PLAN_ONLY: Final = Family(rotates_halves=False, plain_residuals=False)
_RECURRENT: Final = replace(_PLAN_ONLY, packs=False)
_ONE_TEXT: Final = replace(_PLAN_ONLY, separates_documents=False, packs=False)

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "deepseek_v2": Family(rotates_halves=False, interleaved_latents=True),
    "deepseek_v3": Family(rotates_halves=False),
    "deepseek_v32": Family(rotates_halves=False, plain_residuals=False),
    "deepseek_v4": replace(_ONE_TEXT, trains_drafts=False),
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
    "llama4_text": replace(_PLAN_ONLY, packs=False),
    "minimax_m2": _PLAN_ONLY,
    "gpt_oss": _ONE_TEXT,
    "granitemoe": replace(_PLAN_ONLY, plain_head=False),
    "lfm2": _RECURRENT,
    "lfm2_moe": _RECURRENT,
    "kimi_linear": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "qwen3_5_text": _RECURRENT,
    "qwen3_5_moe_text": _RECURRENT,
    "qwen2_5_vl_text": replace(_ONE_TEXT, alone=False),
    "qwen3_vl_text": replace(_ONE_TEXT, alone=False),
    "deepseek_ocr2_text": replace(_PLAN_ONLY, alone=False),
})  # fmt: skip
SUPPORTED: Final = tuple(name for name, family in FAMILIES.items() if family.served and family.alone)
PARTS: Final = tuple(name for name, family in FAMILIES.items() if family.served and not family.alone)


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """How a family's models contain their language model.

    Attributes:
        decoder: name of the language model's module within the base model.
        token_types: the argument of `forward` by whose values above 0 the tokens of a picture see each other; "": attention is
            causal throughout.
        bidirectional: value of the language model's `use_bidirectional_attention` for which they do; None: always.
    """

    decoder: str = "language_model"
    token_types: str = ""
    bidirectional: str | None = None


# Models with a vision tower, whose language model has a plan; Transformers computes the rest.
MULTIMODAL: Final[Mapping[str, Multimodal]] = MappingProxyType({
    "qwen2_5_vl": Multimodal(),
    "qwen3_vl": Multimodal(),
    "qwen3_5": Multimodal(),
    "smolvlm": Multimodal(decoder="text_model"),
    "gemma3": Multimodal(token_types="token_type_ids"),
    "gemma4": Multimodal(token_types="mm_token_type_ids", bidirectional="vision"),
    "janus": Multimodal(),
    "deepseek_vl": Multimodal(),
    "deepseek_vl_hybrid": Multimodal(),
    "deepseek_ocr2": Multimodal(),
})  # fmt: skip

# Encoders, which have a plan for hidden states, and neither a cache nor a language model head in it.
ENCODERS: Final = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert")

# Vision towers (the `model_type` of their config) whose layers have a plan.
TOWERS: Final = (
    "qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_5_vision", "siglip_vision_model", "smolvlm_vision", "janus_vision_model",
    "gemma4_vision", "deepseek_ocr2_encoder", "sam_vision_model", "deepseek_ocr2_sam_vision_model",
)  # fmt: skip

_UNKNOWN: Final = Family(served=False, rotates_halves=False, plain_residuals=False, plain_head=False)


def traits(config: Any) -> Family:
    """The traits of a Transformers config's family; of an unknown one none, so that Transformers' own code is used for it."""
    return FAMILIES.get(getattr(config, "model_type", None) or "", _UNKNOWN)
