"""Differences between the supported Transformers releases (5.20 to 5.x), each behind one function.

Release 5.24 renamed the cache, an argument of `forward` and a field of outputs, from `past_key_values` to `cache`, and gradient
checkpointing to activation checkpointing.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Collection
from typing import Any, get_args

from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")


@functools.lru_cache(maxsize=1)
def cache_name() -> str:
    """The name of the cache in the installed release, as an argument of `forward` and a field of its outputs."""
    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def take_cache(arguments: dict[str, Any]) -> Any:
    """Removes the cache from keyword arguments, under either name, and returns it; None if there is none."""
    caches = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    return next((cache for cache in caches if cache is not None), None)


def causal_output(*, cache: Any, **fields: Any) -> CausalLMOutputWithPast:
    """A `CausalLMOutputWithPast` with the cache under the installed release's name."""
    return CausalLMOutputWithPast(**{cache_name(): cache}, **fields)


def output_class(model: Any) -> Any:
    """The output class of a model's forward, which differs for mixtures of experts."""
    model_class: Any = type(model)
    return class_output(model_class)


@functools.lru_cache(maxsize=64)
def class_output(model_class: Any) -> Any:
    """The output class of a model class's forward."""
    annotation = inspect.signature(model_class.forward).return_annotation
    if isinstance(annotation, str):
        names = (part.strip() for part in annotation.split("|"))
        choices = tuple(getattr(sys.modules[model_class.__module__], name, None) for name in names)
    else:
        choices = get_args(annotation) or (annotation,)  # some return a union with tuple
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, ModelOutput):
            return choice
    return CausalLMOutputWithPast if issubclass(model_class, GenerationMixin) else BaseModelOutputWithPast


def causal_lm_class(config_class: type) -> Any:
    """Transformers' class with a language model head, given that of its config. Of Mistral 4's it has only one, which is not
    in the mapping for causal language models. KeyError: there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_PRETRAINING_MAPPING

    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return MODEL_FOR_PRETRAINING_MAPPING[config_class]


def chosen_hidden(requested: Any, count: int) -> Collection[int]:
    """The indices of the hidden states, of `count`, that `output_hidden_states` requests: all; since 5.24 also a selection."""
    try:
        from transformers.utils.output_capturing import resolve_hidden_states_indices, selected_hidden_states
    except ImportError:
        return range(count)
    selected = selected_hidden_states(requested)
    if selected is None:
        return range(count)
    no_model: Any = None  # used only to look up the number of hidden states
    return resolve_hidden_states_indices(no_model, selected, num_hidden_states=count)


def recomputes_layers(model: Any) -> bool:
    """Whether activation checkpointing is on: layers store only their inputs and are recomputed in the backward."""
    return bool(getattr(model, f"is_{_checkpointing(model)}", False))


def recompute_layers(model: Any) -> None:
    """Turns activation checkpointing on."""
    name = _checkpointing(model)
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def keep_layers(model: Any) -> None:
    """Turns activation checkpointing off."""
    getattr(model, f"{_checkpointing(model)}_disable")()


def _checkpointing(model: Any) -> str:
    return "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"


def outputs_are_captured() -> bool:
    """Whether a forward that is running collects hidden states or attentions of its layers."""
    from transformers.utils.output_capturing import _active_collector

    return bool(_active_collector.get())
