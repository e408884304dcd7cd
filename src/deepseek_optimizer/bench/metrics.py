"""Computes latency and throughput from the times of tokens. All sides of a comparison use these definitions.

Prefill tokens/s is prompt tokens over TTFT, including everything around the first step. Decode tokens/s counts the tokens after
the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .runs import Run
from .statistics import summary


@dataclass(frozen=True)
class Metric:
    """A metric's label and unit, and whether higher is better."""

    label: str
    unit: str
    more_is_better: bool


METRICS = {
    "ttft_ms": Metric("first token", "ms", False),
    "tpot_ms": Metric("time per token", "ms", False),
    "itl_ms": Metric("between tokens", "ms", False),
    "e2e_ms": Metric("whole request", "ms", False),
    "prefill_tok_s": Metric("prefill", "tok/s", True),
    "decode_tok_s": Metric("decode", "tok/s", True),
    "output_tok_s": Metric("output", "tok/s", True),
    "requests_s": Metric("requests", "1/s", True),
    "load_s": Metric("load", "s", False),
    "to_first_token_s": Metric("load to first token", "s", False),
    "memory_bytes": Metric("peak memory", "bytes", False),
}


def samples(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Metric -> one sample per run, for `itl_ms` one per gap. Metrics that need a second token are absent without one."""
    samples_by_name: dict[str, list[float]] = {
        "ttft_ms": [r.ttft_s * 1e3 for r in runs],
        "tpot_ms": [r.tpot_s * 1e3 for r in runs if r.tpot_s is not None],
        "itl_ms": [gap * 1e3 for r in runs for gap in r.gaps_s],
        "e2e_ms": [r.e2e_s * 1e3 for r in runs],
        "prefill_tok_s": [r.batch * r.prompt / r.ttft_s for r in runs],
        "decode_tok_s": [r.batch / r.tpot_s for r in runs if r.tpot_s],
        "output_tok_s": [r.generated / r.e2e_s for r in runs],
        "requests_s": [r.batch / r.e2e_s for r in runs],
    }
    return {name: values for name, values in samples_by_name.items() if values}


def figures(values: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Metric -> {"unit", "samples", and what `statistics.summary` returns}."""
    return {
        name: {"unit": METRICS[name].unit, **summary(v, METRICS[name].more_is_better), "samples": v}
        for name, v in values.items()
    }
