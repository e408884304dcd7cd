"""Loads the model of a side, measuring only the time and memory of loading."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..peak_memory import PeakMemory

SIDES = ("transformers", "optimized")


@dataclass(frozen=True)
class Loaded:
    """started: the clock before loading. memory: measures from then on."""

    model: Any
    memory: PeakMemory
    started: float
    load_s: float


def load_side(side: str, path: str | Path, *, threads: int, dtype: str = "bfloat16", config: dict[str, Any]) -> Loaded:
    """Loads one of `SIDES`. Both import the same modules beforehand, and use the same number of threads.

    Args:
        dtype: of the weights in Transformers.
        config: fields of DeepSeekConfig.
    """
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  otherwise their import would count as loading

    from ..text_model import load_text_model
    from ..unoptimized_model import load_unoptimized

    torch.set_num_threads(threads)
    memory, started = PeakMemory(), time.perf_counter()
    if side == "transformers":
        model = load_unoptimized(path, getattr(torch, dtype))
    else:
        model = load_text_model(path, **{"threads": threads, **config})
    return Loaded(model, memory, started, time.perf_counter() - started)
