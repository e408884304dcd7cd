"""Checkpoints saved from one class and opened as another: the names of their weights, and the error where that cannot work.

Transformers loads a family's decoder from any of its classes into any other, and removes or adds the decoder's path in the
names. The manifest of a packed checkpoint has to follow, and so do our own checks of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from ...checkpoint import Checkpoint, Manifest
from ...config import DeepSeekConfig
from ...errors import CheckpointError
from .graphs import decoder_path, whole_graph
from .swap import expected_tensors

_HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def auto_class(class_name: str) -> str | None:
    """The Auto class that opens what was saved from a Transformers class; None for one that none is known for."""
    if class_name.endswith("Model"):
        return "AutoModel"
    return next((f"AutoModel{head}" for head in _HEADS if class_name.endswith(head)), None)


def stored_as(names: Collection[str], model: Any) -> Callable[[str], str]:
    """What one of the model's own names is called in a checkpoint that has these names."""
    path, prefix = decoder_path(model), str(model.base_model_prefix)
    table = "embed_tokens.weight"
    if path and f"{path}.{table}" not in names and table in names:
        return lambda name: name.removeprefix(f"{path}.")
    if not path and table not in names and f"{prefix}.{table}" in names:
        return lambda name: f"{prefix}.{name}"
    return lambda name: name


def renamed_for(model: Any, config: DeepSeekConfig, manifest: Manifest) -> tuple[DeepSeekConfig, Manifest]:
    """A packed checkpoint's settings and manifest with the names that the model has for its matrices."""
    own = {weight.removesuffix(".weight") for weight in whole_graph(model).weights()}
    path, prefix = decoder_path(model), str(model.base_model_prefix)

    def named(name: str) -> str:
        inner = name.removeprefix(f"{prefix}.")
        return next((n for n in (name, inner, f"{path}.{name}") if n in own), name)

    def fitting(entry: str) -> str | None:
        candidates = (entry, entry.removeprefix(f"{prefix}."), f"{path}.{entry}")
        return next((e for e in candidates if not DeepSeekConfig(formats={e: "fp32"}).unmatched(own)), None)

    # entries for a head that this class does not have are left out
    formats = {new: f for entry, f in (config.formats or {}).items() if (new := fitting(entry)) is not None}
    return replace(config, formats=formats or None), manifest.renamed(named)


def check_class(checkpoint: Checkpoint, model: Any) -> None:
    """Whether a checkpoint that was saved from another class has what `from_pretrained` of this one needs.

    Raises:
        CheckpointError: it has not; the message names that class and what opens it.
    """
    missing = _missing(checkpoint, model, stored_as(checkpoint.tensors, model))
    if missing is not None and (saved := _saved_from(checkpoint, model)) is not None:
        raise CheckpointError(
            f"was saved from {saved} and lacks {missing}, which {type(model).__name__} needs; open it with "
            f"{auto_class(saved)}.from_pretrained",
            file=checkpoint.path,
            tensor=missing,
        )


def check_causal(checkpoint: Checkpoint, model: Any) -> None:
    """The same for `load_model`, which renames nothing and leaves nothing over.

    Raises: CheckpointError.
    """
    saved = _saved_from(checkpoint, model)
    if saved is None:
        return
    foreign = any(name.partition(".")[0] not in ("model", "lm_head") for name in checkpoint.tensors)
    if foreign or _missing(checkpoint, model, lambda name: name) is not None:
        raise CheckpointError(
            f"was saved from {saved}, and load_model makes {type(model).__name__}; open it with "
            f"{auto_class(saved)}.from_pretrained(path, quantization_config=DeepSeekConfig(...))",
            file=checkpoint.path,
        )


def _saved_from(checkpoint: Checkpoint, model: Any) -> str | None:
    """The class that a checkpoint was saved from, if it differs from the model's and an Auto class opens it."""
    saved = checkpoint.config().get("architectures")
    name = saved[0] if isinstance(saved, list) and saved else None
    return name if isinstance(name, str) and name != type(model).__name__ and auto_class(name) is not None else None


def _missing(checkpoint: Checkpoint, model: Any, here: Callable[[str], str]) -> str | None:
    """The first tensor of the decoder, or of the family's head, that is not there under the name `here` gives it."""
    planned = set(whole_graph(model).weights())
    _, shapes = expected_tensors(model)
    needed = (t for name, shape in shapes.items() if name in planned for t in checkpoint.stored(here(name), tuple(shape)))
    return next((tensor for tensor in needed if tensor not in checkpoint.tensors), None)
