"""The part of a published checkpoint that is loaded: of a multimodal model its language model, without multi-token prediction.

Transformers' causal language model classes load these families in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .base import TensorInfo
from .manifest import KEY


@dataclass(frozen=True)
class LanguagePart:
    """How a family's checkpoints contain its language model.

    Attributes:
        model_type: of the language model, whose fields are the config's `text_config`, if that names none; "": the model is
            nothing else.
        prefixes: beginnings of its tensors' names, and what the language model by itself has in their place.
        unread: names of tensors that are not loaded, by what they belong to.
        shares_kv: whether the last `num_kv_shared_layers` layers read the keys and values of others, so that their own, which
            checkpoints may contain, are not loaded.
    """

    model_type: str = ""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    shares_kv: bool = False


VISION: Final = "the vision tower"
_MTP: Final = {"multi-token prediction": r"mtp\..*"}
_QWEN: Final = {VISION: r"model\.visual\..*", **_MTP}
_IN_MODEL: Final = {"model.language_model.": "model."}
_IMAGES: Final = {VISION: r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\..*"}
_GLM_5: Final = {"multi-token prediction": r"model\.layers\.78\..*"}
_TOWERS: Final = {
    VISION: r"model\.(vision_tower|embed_vision|vision_embedder)\..*",
    "the audio tower": r"model\.(audio_tower|embed_audio)\..*",
}
_PARTS: Final[Mapping[str, LanguagePart]] = {
    "glm_moe_dsa": LanguagePart(unread=_GLM_5),
    "llama4": LanguagePart("llama4_text", {"language_model.": ""}, _IMAGES),
    "mistral3": LanguagePart("mistral", {"language_model.": "", **_IN_MODEL}, _IMAGES),
    "qwen3_next": LanguagePart(unread=_MTP),
    "qwen3_5": LanguagePart("qwen3_5_text", _IN_MODEL, _QWEN),
    "qwen3_5_text": LanguagePart(unread=_MTP),
    "qwen3_5_moe": LanguagePart("qwen3_5_moe_text", _IN_MODEL, _QWEN),
    "qwen3_5_moe_text": LanguagePart(unread=_MTP),
    "gemma4": LanguagePart("gemma4_text", _IN_MODEL, _TOWERS, shares_kv=True),
    "gemma4_text": LanguagePart(shares_kv=True),
    "gemma4_unified": LanguagePart("gemma4_unified_text", _IN_MODEL, _TOWERS, shares_kv=True),
    "gemma4_unified_text": LanguagePart(shares_kv=True),
}
MAX_LAYERS: Final = 4096  # more than any model has
# Fields of the whole model that apply to its language model; those of `text_config` override them.
_SHARED: Final[tuple[str, ...]] = (
    "dtype",
    "torch_dtype",
    "quantization_config",
    "tie_word_embeddings",
    "architectures",
    "transformers_version",
)


def language_part(
    config: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, Any], dict[str, TensorInfo], list[str]]:
    """The config and the tensors of the language model, and one line for each part that is left out.

    Args:
        config: the content of config.json.
        tensors: stored tensors by name.
    """
    model_type = config.get("model_type")
    part = _PARTS.get(model_type) if isinstance(model_type, str) else None
    if part is None:
        return config, dict(tensors), []
    if part.model_type and isinstance(text := config.get("text_config"), dict):
        shared = {name: config[name] for name in _SHARED if name in config}
        tied = bool(config.get("tie_word_embeddings")) and not any(name.endswith("lm_head.weight") for name in tensors)
        config = {**shared, "model_type": part.model_type, **text}
        if tied:  # what the whole model's class does, whatever its language model's config says
            config["tie_word_embeddings"] = True
    kept, remarks = dict(tensors), []
    unread_parts = {**part.unread, **(_shared_kv(config) if part.shares_kv else {})}
    for what, pattern in unread_parts.items():
        unread = [name for name in kept if re.fullmatch(pattern, name)]
        if unread:
            remarks.append(f"{what} is not loaded ({len(unread)} tensor{'' if len(unread) == 1 else 's'})")
        for name in unread:
            del kept[name]
    return config, {_renamed(name, part.prefixes): info for name, info in kept.items()}, remarks


def packed_language_part(
    config: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, Any], dict[str, TensorInfo], list[str]]:
    """`language_part` of a packed checkpoint that has a vision tower; of any other what is given, since all its tensors are
    loaded.

    Its `packed_manifest` has the language model's names. `formats` among its settings is dropped: it may name the tower's
    layers, and the manifest says which format everything has.
    """
    part, kept, left_out = language_part(config, tensors)
    if not any(line.startswith(VISION) for line in left_out):
        return config, dict(tensors), []
    part = dict(part)
    part["quantization_config"] = {**config["quantization_config"], "formats": None}
    section = config.get(KEY)
    if isinstance(section, Mapping) and isinstance(section.get("modules"), Mapping):
        loaded = {info.name.removesuffix(".weight") for info in kept.values()}
        prefixes = _PARTS[config["model_type"]].prefixes
        modules = {_renamed(name, prefixes): entry for name, entry in section["modules"].items() if name in loaded}
        part[KEY] = {**section, "modules": modules}
    elif section is not None:
        part[KEY] = section  # is refused where it is read
    return part, kept, left_out


def language_names(name: str, model_type: str) -> list[str]:
    """The names that a tensor of a whole model may have in its language model of family `model_type`: its own, and those
    without the whole model's prefixes."""
    parts = [part for family, part in _PARTS.items() if model_type in (family, part.model_type)]
    return list(dict.fromkeys((name, *(_renamed(name, part.prefixes) for part in parts))))


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)


def _shared_kv(config: Mapping[str, Any]) -> dict[str, str]:
    """`unread` for the keys and values of layers that read those of others."""
    layers, shared = config.get("num_hidden_layers"), config.get("num_kv_shared_layers")
    if not isinstance(layers, int) or not isinstance(shared, int) or not 0 < shared <= layers <= MAX_LAYERS:
        return {}
    numbers = "|".join(map(str, range(layers - shared, layers)))
    names = r"(k_proj|v_proj|k_norm|v_norm)\..*"
    return {
        "the unused key and value part of shared layers": rf"model\.(language_model\.)?layers\.({numbers})\.self_attn\.{names}"
    }
