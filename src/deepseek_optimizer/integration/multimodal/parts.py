"""The language model within a multimodal model: its config, its module and the names of its weights."""

from __future__ import annotations

import copy
from typing import Any

from ...errors import UnsupportedModelError
from ...graph.ir import Graph
from ...models import MULTIMODAL, Multimodal, build_graph

_HEAD = "lm_head"


def multimodal(config: Any) -> Multimodal | None:
    """How a Transformers config's model contains its language model; None: it is not multimodal, or of no known family."""
    return MULTIMODAL.get(getattr(config, "model_type", None) or "")


def language_config(config: Any) -> Any:
    """A copy of a multimodal config's `text_config`, with what the whole config says about the language model."""
    text = copy.deepcopy(config.get_text_config())
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    vision = getattr(config, "vision_config", None)
    if (layers := getattr(vision, "deepstack_visual_indexes", None)) is not None:
        text.deepstack_layers = len(layers)
    return text


def why_no_language_plan(config: Any) -> str | None:
    """Why the language model of a multimodal model has no plan; None: it has one.

    Raises:
        ConfigError: a field is not valid.
    """
    if multimodal(config) is None:
        return f"config.model_type {config.model_type!r} is no multimodal model with a plan"
    try:
        build_graph(language_config(config))
    except UnsupportedModelError as error:
        return str(error)
    return None


def is_whole(model: Any) -> bool:
    """Whether a model of a multimodal family has a language model head, and so generates text."""
    return multimodal(model.config) is not None and hasattr(model, _HEAD) and hasattr(model, "model")


def decoder_path(model: Any) -> str:
    """Path of the language model's module in the whole model."""
    kind = multimodal(model.config)
    assert kind is not None
    return f"model.{kind.decoder}"


def language_graph(model: Any) -> Graph:
    """The unfused graph of a multimodal model's language model, with the whole model's names of weights."""
    path = decoder_path(model)

    def named(weight: str) -> str:
        inner = weight.removeprefix("model.")
        return weight if inner == weight else f"{path}.{inner}"

    return build_graph(language_config(model.config)).renamed(named)
