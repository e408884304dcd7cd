"""A model of Transformers with all its weights, read for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..errors import CheckpointError


def load_whole(source: Path, dtype: torch.dtype) -> Any:
    """
    Args:
        source: a checkpoint's directory.
        dtype: of the weights.

    Raises:
        CheckpointError: the checkpoint lacks weights, which Transformers would draw at random, or has others of their shape.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _no_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(source), **options)
    model, found = loaded
    lacking = sorted(found["missing_keys"]) or sorted(str(name) for name, *_ in found["mismatched_keys"])
    if lacking:
        what = "is not in the checkpoint" if found["missing_keys"] else "is of another shape than the config says"
        more = f", nor are {len(lacking) - 1:,} others" if len(lacking) > 1 and found["missing_keys"] else ""
        raise CheckpointError(f"{what}{more}; training would begin from random weights there", file=source, tensor=lacking[0])
    return model


@contextmanager
def _no_report() -> Iterator[None]:
    """Without Transformers' table of tensors that it leaves out: those of MTP layers, which the plan has told of."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
