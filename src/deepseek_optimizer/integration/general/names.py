"""Names of a model's tensors in a checkpoint saved from another class: with or without the path of the base model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ...checkpoint import Manifest


def stored_as(names: Collection[str], model: Any) -> Callable[[str], str]:
    """A function from the model's tensor names to those of a checkpoint that contains `names`."""
    prefix = f"{model.base_model_prefix}."
    return lambda name: next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in names), name)


def renamed_for(model: Any, manifest: Manifest) -> Manifest:
    """The manifest of a packed checkpoint with the names that this model has."""
    own = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    return manifest.renamed(lambda name: next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in own), name))
