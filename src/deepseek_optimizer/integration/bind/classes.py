"""Checkpoints saved from one model class and loaded into another: weight names, and the errors if that is impossible.

Transformers loads the decoder of any class of a family into any other class, and removes or adds the decoder's path in the
weight names. The manifest of a packed checkpoint and the checks of this package have to do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from ...checkpoint import Checkpoint, Manifest
from ...config import DeepSeekConfig
from ...errors import CheckpointError
from .graphs import decoder_name, decoder_path, whole_graph
from .swap import expected_tensors

_HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def auto_class(class_name: str) -> str | None:
    """The Auto class that loads checkpoints of a Transformers class; None if there is none."""
    if class_name.endswith("Model"):
        return "AutoModel"
    return next((f"AutoModel{head}" for head in _HEADS if class_name.endswith(head)), None)


def stored_as(names: Collection[str], model: Any) -> Callable[[str], str]:
    """A function from the model's weight names to those of a checkpoint that contains `names`."""
    path, prefix = decoder_path(model), decoder_name(model)
    table = "embed_tokens.weight"
    if path and f"{path}.{table}" not in names and table in names:
        return lambda name: name.removeprefix(f"{path}.")
    if not path and table not in names and f"{prefix}.{table}" in names:
        return lambda name: f"{prefix}.{name}"
    return lambda name: name


def renamed_for(model: Any, config: DeepSeekConfig, manifest: Manifest) -> tuple[DeepSeekConfig, Manifest]:
    """The settings and manifest of a packed checkpoint, with its matrices renamed as in the model.

    Entries of `formats` for a head that this class does not have are dropped.
    """
    own = {weight.removesuffix(".weight") for weight in whole_graph(model).weights()}
    path, prefix = decoder_path(model), decoder_name(model)

    def named(name: str) -> str:
        inner = name.removeprefix(f"{prefix}.")
        return next((n for n in (name, inner, f"{path}.{name}") if n in own), name)

    def fitting(entry: str) -> str | None:
        candidates = (entry, entry.removeprefix(f"{prefix}."), f"{path}.{entry}")
        return next((e for e in candidates if not DeepSeekConfig(formats={e: "fp32"}).unmatched(own)), None)

    formats = {new: f for entry, f in (config.formats or {}).items() if (new := fitting(entry)) is not None}
    return replace(config, formats=formats or None), manifest.renamed(named)


def check_class(checkpoint: Checkpoint, model: Any) -> None:
    """Checks that a checkpoint saved from another class contains what `from_pretrained` of this class needs.

    Raises:
        CheckpointError: it does not; the message names that class and the Auto class that loads it.
    """
    missing = _missing(checkpoint, model, stored_as(checkpoint.tensors, model))
    if missing is not None and (saved := _saved_from(checkpoint, model)) is not None:
        raise CheckpointError(
            f"was saved from {saved} and lacks {missing}, which {type(model).__name__} needs; load it with "
            f"{auto_class(saved)}.from_pretrained",
            file=checkpoint.path,
            tensor=missing,
        )


def check_causal(checkpoint: Checkpoint, model: Any) -> None:
    """Performs the check of `check_class` for `load_model`, which neither renames weights nor ignores extra ones.

    Raises:
        CheckpointError: the checkpoint was saved from a class that `load_model` cannot load.
    """
    saved = _saved_from(checkpoint, model)
    if saved is None:
        return
    foreign = any(name.partition(".")[0] not in ("model", "lm_head") for name in checkpoint.tensors)
    if foreign or _missing(checkpoint, model, lambda name: name) is not None:
        raise CheckpointError(
            f"was saved from {saved}, but load_model returns a {type(model).__name__}; load it with "
            f"{auto_class(saved)}.from_pretrained(path, quantization_config=DeepSeekConfig(...))",
            file=checkpoint.path,
        )


def _saved_from(checkpoint: Checkpoint, model: Any) -> str | None:
    """The class that a checkpoint was saved from, if it differs from the model's and an Auto class loads it."""
    saved = checkpoint.config().get("architectures")
    name = saved[0] if isinstance(saved, list) and saved else None
    return name if isinstance(name, str) and name != type(model).__name__ and auto_class(name) is not None else None


def _missing(checkpoint: Checkpoint, model: Any, here: Callable[[str], str]) -> str | None:
    """The first tensor of the decoder, or of the family's head, that the checkpoint lacks. `here`: see `stored_as`."""
    planned = set(whole_graph(model).weights())
    _, shapes = expected_tensors(model)
    needed = (t for name, shape in shapes.items() if name in planned for t in checkpoint.stored(here(name), tuple(shape)))
    return next((tensor for tensor in needed if tensor not in checkpoint.tensors), None)
