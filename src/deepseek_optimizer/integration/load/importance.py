"""Runs a lossless model over a text to measure which columns of its matrices matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ...calibration.statistics import ColumnSquares
from ...system.threads import one_torch_thread
from ..bind.graphs import decoder_path
from ..bind.packed_experts import PackedExperts
from ..bind.runtime import runtime_of
from ..bind.swap import sites


def measure_importance(
    model: Any, texts: Sequence[torch.Tensor], progress: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Importance of each column of the model's matrices: the mean square of its input, scaled to mean 1.

    Args:
        model: an optimized model, packed losslessly.
        texts: token ids, int64 [1, n] each.
        progress: called after each text with the number done and the total.

    Returns: float32 [K] by weight name, for each matrix of a product and each stack of experts, whose matrices share it; none
        for an embedding without a tied head.
    """
    packable = sites(model, runtime_of(model).graph)
    head, columns = model.get_output_embeddings(), ColumnSquares()
    read_by_head = [site.weights["weight"] for site in packable if site.module is head and isinstance(head, nn.Linear)]
    readers: dict[str, nn.Module] = {
        site.weights["weight"]: site.module for site in packable if isinstance(site.module, nn.Linear)
    }
    experts = [site for site in packable if isinstance(site.module, PackedExperts)]
    readers |= {site.weights["gate_up_proj"]: site.module for site in experts}  # shared by all experts of a layer
    with one_torch_thread(), torch.inference_mode(), ExitStack() as watching:
        watching.enter_context(columns.watching({name: m for name, m in readers.items() if name not in read_by_head}))
        for site in experts:
            watching.enter_context(_listening(site.module, partial(_add, columns, site.weights["down_proj"])))
        for done, ids in enumerate(texts, 1):
            hidden = model.get_submodule(decoder_path(model))(ids, use_cache=False)[0]
            for name in read_by_head:
                columns.add(name, hidden)  # the head's input: its logits are not needed
            if progress is not None:
                progress(done, len(texts))
    return columns.importance()


def _add(columns: ColumnSquares, name: str, expert: int, x: torch.Tensor, h: torch.Tensor) -> None:
    """Adds the inputs of an expert's down projection. All experts of a layer share the importance of these columns, because a
    single expert gets too few tokens of a short text."""
    columns.add(name, h)


@contextmanager
def _listening(experts: Any, listener: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    experts.listener = listener
    try:
        yield
    finally:
        experts.listener = None
