"""Loading a Transformers model for training, with all its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..errors import CheckpointError


def load_for_training(source: Path, dtype: torch.dtype) -> Any:
    """Loads a model; missing weights are an error, where Transformers would initialize them at random.

    Args:
        source: directory of the checkpoint.
        dtype: dtype of the weights.

    Raises:
        CheckpointError: a weight is missing or has the wrong shape.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(source), **options)
    model, info = loaded
    missing = sorted(info["missing_keys"]) or sorted(str(name) for name, *_ in info["mismatched_keys"])
    if missing:
        what = "is missing from the checkpoint" if info["missing_keys"] else "does not have the shape that the config requires"
        more = f", and so are {len(missing) - 1:,} others" if len(missing) > 1 and info["missing_keys"] else ""
        message = (
            f"{what}{more}, so training would start from random weights; check config.json, or download the checkpoint again"
        )
        raise CheckpointError(message, file=source, tensor=missing[0])
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Suppresses Transformers' list of tensors it does not load: those of MTP layers, which the plan mentions."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
