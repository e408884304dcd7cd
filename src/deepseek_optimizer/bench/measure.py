"""Measures a loaded model: figures, their share of the machine's limits, energy and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .cost import Speed, machine_cost
from .energy import Energy
from .memory_traffic import traffic_of
from .metrics import figures, samples
from .roofline import Roofline
from .runs import repeated
from .work import Work


def measure(
    model: Any,
    works: Sequence[Work],
    *,
    repeats: int = 5,
    warmup: int = 1,
    price_per_hour: float | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One entry per work: {"work", "figures", "limits", "watts", "joules_per_token", "cost"}; None if unknown. "cost" is
    that of a million tokens, see `machine_cost`, without "out" and "blended" if one token is generated. `add_limits` sets
    "limits".

    Args:
        model: a Transformers model, optimized or not.
        price_per_hour: of this machine, in the currency of the resulting cost.
    """
    entries = []
    for work in works:
        note(str(work))
        energy = Energy()
        runs = list(repeated(model, work, repeats=repeats, warmup=warmup))
        joules, watts = energy.joules, energy.watts
        measured = figures(samples(runs))
        generated = sum(run.generated for run in runs) * (repeats + warmup) / repeats  # the counter includes the warm-up
        entries.append(
            {
                "work": asdict(work),
                "figures": measured,
                "limits": None,
                "watts": watts,
                "joules_per_token": None if joules is None else joules / generated,
                "cost": None if price_per_hour is None else _cost(price_per_hour, measured, work),
            }
        )
    return entries


def add_limits(roofline: Roofline, model: Any, entries: Sequence[dict[str, Any]]) -> None:
    """Sets "limits" of each entry. A separate step, since measuring the machine takes memory that is not the model's."""
    traffic = traffic_of(model)
    for entry in entries:
        measured = entry["figures"]
        decode = measured["decode_tok_s"]["p50"] if "decode_tok_s" in measured else None
        entry["limits"] = roofline.share(traffic, Work(**entry["work"]), measured["ttft_ms"]["p50"], decode)


def _cost(per_hour: float, measured: dict[str, Any], work: Work) -> dict[str, float]:
    answer = measured["decode_tok_s"]["p50"] if "decode_tok_s" in measured else None
    cost = machine_cost(per_hour, Speed(measured["prefill_tok_s"]["p50"], answer or math.inf), work)
    return cost if answer else {"in": cost["in"]}
