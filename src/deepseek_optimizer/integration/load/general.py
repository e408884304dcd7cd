"""`load_model` for models without an execution plan, by Transformers' own loader and `PackingQuantizer`."""

from __future__ import annotations

from typing import Any

import torch

from ...checkpoint import Checkpoint, GgufCheckpoint, PackedCheckpoint, SafetensorsCheckpoint
from ...config import DeepSeekConfig
from ...errors import CheckpointError, ConfigError, DeepSeekOptimizerError, UnsupportedModelError
from ...models import ENCODERS, MULTIMODAL
from ..configs import check_config
from ..general import check_settings, encoder_reason, needs_a_plan
from ..multimodal import why_no_language_plan

_LISTED = 3  # names listed in an error or note


def why_general_path(checkpoint: Checkpoint, config: DeepSeekConfig | None, fields: dict[str, Any]) -> str | None:
    """Why a checkpoint's model has no execution plan and is loaded without one; None: it has one.

    Args:
        checkpoint: the checkpoint.
        config, fields: as in `load_model`; only `strict` matters.

    Raises:
        ConfigError: a field of the checkpoint's config is not valid.
        UnsupportedModelError: there is no plan, and `strict` is set, or Transformers does not know the model either.
    """
    raw = checkpoint.config()
    try:
        check_config(raw)
        return None
    except UnsupportedModelError as error:
        strict = fields.get("strict", getattr(config, "strict", False))
        if raw.get("model_type") in ENCODERS and not isinstance(checkpoint, GgufCheckpoint):
            return encoder_reason(raw["model_type"])  # whether its plan has all that is needed, `why_general` tells later
        if strict or isinstance(checkpoint, GgufCheckpoint) or model_class(raw) is None:
            raise
        return str(error)


def why_language_alone(checkpoint: Checkpoint, settings: DeepSeekConfig) -> str | None:
    """Why `load_model` loads the language model of a multimodal checkpoint alone; "": on request, or as in all models of its
    family; None: it loads the whole model.

    Args:
        checkpoint: it, opened as its language model.
        settings: the settings.

    Raises:
        ConfigError: a field of its config is not valid.
    """
    raw = checkpoint.whole
    assert raw is not None
    if raw["model_type"] not in MULTIMODAL:
        return None if isinstance(checkpoint, PackedCheckpoint) else ""  # it was packed without a plan
    if settings.vision == "off":
        return ""
    if type(checkpoint) not in (SafetensorsCheckpoint, PackedCheckpoint):
        return "its files are quantized"
    if settings.strict:
        return "strict=True, and only its language model is a plan as a whole"
    if (name := needs_a_plan(settings, language=True)) is not None:
        return f"{name}={getattr(settings, name)!r} needs an execution plan of the whole model"
    return why_no_language_plan(_transformers_config(checkpoint, raw))


def _transformers_config(checkpoint: Checkpoint, raw: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # a wrong field may cause any error in Transformers
        raise ConfigError(f"{checkpoint.path}: Transformers cannot use this config: {' '.join(str(error).split())}") from error


def model_class(raw: dict[str, Any]) -> Any:
    """Transformers' class for the content of a config.json: the one it was saved from, or else that of the whole multimodal
    model, or a class with a language model head, or the base model. None: Transformers has none."""
    import transformers
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_MAPPING,
        PreTrainedModel,
    )

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[kind]
    saved = raw.get("architectures")
    name = saved[0] if isinstance(saved, list) and saved else None
    named = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.config_class is config_class:
        return named
    mappings: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING)
    if kind in MULTIMODAL:  # first, since a class of the language model does not take the config of the whole
        mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, *mappings)
    return next((mapping[config_class] for mapping in mappings if config_class in mapping), None)


def empty_model(config: Any, architecture: str | None, dtype: torch.dtype) -> Any:
    """A model on the meta device.

    Args:
        config: its Transformers config.
        architecture: name of its class; None: that with a language model head.
        dtype: of its parameters.
    """
    own = model_class({"model_type": config.model_type, "architectures": [architecture]})
    with torch.device("meta"):
        return own._from_config(config, dtype=dtype)


def load_general(checkpoint: Checkpoint, settings: DeepSeekConfig, reason: str) -> Any:
    """The model of a checkpoint that takes the general path.

    Args:
        checkpoint: it, open.
        settings: the settings.
        reason: why there is no plan.

    Raises:
        CheckpointError: weights are missing, have other shapes, contain NaN, or are quantized by another method.
        ConfigError: Transformers cannot use the config, or a setting needs a plan.
        NotEnoughMemoryError: the weights do not fit in free memory.
    """
    from transformers import CONFIG_MAPPING

    raw = checkpoint.config()
    sees = raw["model_type"] in MULTIMODAL
    check_settings(settings, reason, language=sees)  # whether its language model has a plan, the quantizer tells
    if sees and settings.vision == "off":
        raise ConfigError(f"vision='off': the language model of this {raw['model_type']} checkpoint cannot be loaded alone")
    if type(checkpoint) not in (SafetensorsCheckpoint, PackedCheckpoint):
        raise CheckpointError(
            f"is quantized ({checkpoint.kind}), which the general path cannot read; use the original checkpoint",
            file=checkpoint.path,
        )
    raw.pop("quantization_config", None)
    own = model_class(raw)
    dtype = torch.float32 if settings.precision == "fp32" else "auto"
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        if isinstance(checkpoint, PackedCheckpoint):
            config.quantization_config = settings.to_dict()  # Transformers would ignore settings given beside stored ones
        model, info = own.from_pretrained(
            str(checkpoint.path),
            config=config,
            quantization_config=None if isinstance(checkpoint, PackedCheckpoint) else settings,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except (DeepSeekOptimizerError, MemoryError):
        raise
    except Exception as error:  # a wrong field or tensor may cause any error in Transformers
        raise ConfigError(
            f"{checkpoint.path}: Transformers cannot load this as a {own.__name__}: {' '.join(str(error).split())}"
        ) from error
    checkpoint.check_unchanged()
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"lacks {_list(missing)}, which {own.__name__} needs; load it with the class it was saved from, and "
            "quantization_config=DeepSeekConfig(...)",
            file=checkpoint.path,
            tensor=missing[0],
        )
    if unused := sorted(info["unexpected_keys"]):
        model.dso.warn_once(f"{own.__name__} does not use all tensors of the checkpoint: {_list(unused)}")
    return model


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"
