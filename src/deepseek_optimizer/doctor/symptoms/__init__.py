"""Symptoms that users report, one per file: each a `SYMPTOM` with the checks it depends on and its own measurement."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from ...errors import ConfigError
from . import cuda_error, garbage, latency_jitter, out_of_memory, repetition, slow
from .base import Symptom

SYMPTOMS: Mapping[str, Symptom] = {
    "out-of-memory": out_of_memory.SYMPTOM,
    "repetition": repetition.SYMPTOM,
    "cuda-error": cuda_error.SYMPTOM,
    "slow": slow.SYMPTOM,
    "garbage": garbage.SYMPTOM,
    "latency-jitter": latency_jitter.SYMPTOM,
}


def get_symptom(name: str) -> Symptom:
    """The symptom called `name`. Raises ConfigError if it is unknown."""
    if name in SYMPTOMS:
        return SYMPTOMS[name]
    near = difflib.get_close_matches(name, SYMPTOMS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown symptom {name!r}{hint} (known: {', '.join(SYMPTOMS)})")


__all__ = ["SYMPTOMS", "Symptom", "get_symptom"]
