"""Sampling parameters in the metadata of a GGUF file: what its authors recommend, from the original's generation config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Key under `general.sampling.` (gguf-py's constants) -> name in a generation config, minimum, maximum.
_KEYS = {
    "temp": ("temperature", 1e-6, 100.0),
    "top_k": ("top_k", 0, (1 << 31) - 1),
    "top_p": ("top_p", 1e-6, 1.0),
    "min_p": ("min_p", 0.0, 1.0),
    "penalty_repeat": ("repetition_penalty", 1e-6, 100.0),
}


def sampling_parameters(values: Mapping[str, Any]) -> dict[str, int | float]:
    """The sampling parameters, by their names in a generation config. Values outside their range are left out.

    Args:
        values: of the file's header, by key.
    """
    parameters: dict[str, int | float] = {}
    for key, (name, low, high) in _KEYS.items():
        value = values.get(f"general.sampling.{key}")
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            continue
        parameters[name] = int(value) if isinstance(low, int) else round(float(value), 6)  # stored as float32
    return parameters
