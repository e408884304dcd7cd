"""Calibration of a load: the model as it is, run over the calibration text, says which columns of its matrices matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..calibration.statistics import ColumnSquares
from ..calibration.text import LENGTH, read_text, stretches
from ..checkpoint import Checkpoint, PackedCheckpoint, load_tokenizer
from ..config import DeepSeekConfig
from ..quant import WEIGHED
from .progress import counted
from .runtime import runtime_of
from .swap import sites

UNUSED = "the calibration text was not used: no matrix is rounded to " + " or ".join(sorted(WEIGHED))


def importance_for(
    checkpoint: Checkpoint, settings: DeepSeekConfig, formats: Mapping[str, str | None], load_original: Callable[[], Any]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Column importance by weight name, as `quant.Packer` has it, where `settings` ask for it and a format reads it; and notes.

    Args:
        formats: weight name -> the format it will be packed in, None for what is not packed.
        load_original: loads the model without loss; it is dropped again before this returns.

    Raises:
        ConfigError: the calibration text cannot be read, or is too short.
    """
    if settings.calibration is None or settings.chooses_formats or isinstance(checkpoint, PackedCheckpoint):
        return {}, []
    if not any(format in WEIGHED and checkpoint.lossless_format(name) != format for name, format in formats.items()):
        return {}, [UNUSED]
    length = min(LENGTH, checkpoint.config().get("max_position_embeddings", LENGTH))
    texts = stretches(load_tokenizer(checkpoint), read_text(settings.calibration), length, source=settings.calibration)
    original = load_original()  # shows a bar of its own
    with counted("Calibrating") as progress:
        return measure_importance(original, texts, progress), []


def measure_importance(
    model: Any, texts: Sequence[torch.Tensor], progress: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Float32 [K], of mean 1, for each matrix that products read; an embedding that no head shares has none.

    Args:
        model: optimised, packed without loss.
        texts: token ids, int64 [1, n] each.
        progress: called after each text with how many are done, and how many there are.
    """
    found = sites(model, runtime_of(model).graph)
    linear = {site.weight: site.module for site in found if isinstance(site.module, nn.Linear)}
    head = model.get_output_embeddings()
    columns = ColumnSquares()
    with one_torch_thread(), torch.inference_mode(), columns.watching({name: m for name, m in linear.items() if m is not head}):
        for done, ids in enumerate(texts, 1):
            hidden = model.base_model(ids, use_cache=False)[0]
            for name in (name for name, module in linear.items() if module is head):
                columns.add(name, hidden)  # what the head reads: its logits are not needed
            if progress is not None:
                progress(done, len(texts))
    return columns.importance()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """The products run on the backend's threads: torch's own, which spin between its small operations, would wait for their
    cores at each change of hands (8 ms an operation on two cores; 31 s for 1,024 tokens of SmolLM2 instead of 1.1)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
