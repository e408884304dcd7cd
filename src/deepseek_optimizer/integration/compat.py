"""What differs between the Transformers releases this package runs on (5.20 to 5.x), under one name each.

5.24 renamed the cache argument of `forward` and of the outputs from `past_key_values` to `cache`, and gradient checkpointing to
activation checkpointing.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Collection
from typing import Any

from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")


@functools.lru_cache(maxsize=1)
def cache_name() -> str:
    """The cache's name in the installed release: an argument of `forward`, a field of its outputs."""
    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def take_cache(arguments: dict[str, Any]) -> Any:
    """Removes the cache from keyword arguments, whichever name the caller used, and returns it."""
    found = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    return next((cache for cache in found if cache is not None), None)


def causal_output(*, cache: Any, **fields: Any) -> CausalLMOutputWithPast:
    """A `CausalLMOutputWithPast` with the cache under the name of the release."""
    return CausalLMOutputWithPast(**{cache_name(): cache}, **fields)


def output_class(model: Any) -> Any:
    """The class of what a model's forward returns: with experts it is another than without."""
    model_class: Any = type(model)
    return _output_class(model_class)


@functools.lru_cache(maxsize=64)
def _output_class(model_class: Any) -> Any:
    found = inspect.signature(model_class.forward).return_annotation
    if isinstance(found, str):
        found = getattr(sys.modules[model_class.__module__], found, None)
    if isinstance(found, type) and issubclass(found, ModelOutput):
        return found
    return CausalLMOutputWithPast if issubclass(model_class, GenerationMixin) else BaseModelOutputWithPast


def chosen_hidden(asked: Any, count: int) -> Collection[int]:
    """Which of `count` hidden states `output_hidden_states` asks for: all; since 5.24 also those at an index or several."""
    try:
        from transformers.utils.output_capturing import resolve_hidden_states_indices, selected_hidden_states
    except ImportError:
        return range(count)
    selected = selected_hidden_states(asked)
    if selected is None:
        return range(count)
    nobody: Any = None  # the model is looked at for their number only
    return resolve_hidden_states_indices(nobody, selected, num_hidden_states=count)


def recomputes_layers(model: Any) -> bool:
    """Whether a model's layers keep their inputs alone for the backward."""
    return bool(getattr(model, f"is_{_checkpointing(model)}", False))


def recompute_layers(model: Any) -> None:
    """Has a model's layers keep their inputs alone."""
    name = _checkpointing(model)
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def keep_layers(model: Any) -> None:
    """Undoes `recompute_layers`."""
    getattr(model, f"{_checkpointing(model)}_disable")()


def _checkpointing(model: Any) -> str:
    return "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
