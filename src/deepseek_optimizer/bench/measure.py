"""Measures a loaded model: figures, their share of the machine's limits, energy and cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

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
    """One entry per work: {"work", "figures", "limits", "watts", "joules_per_token", "cost_per_million"}; None if unknown.
    `add_limits` sets "limits".

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
        speed = measured["output_tok_s"]["p50"]
        generated = sum(run.generated for run in runs) * (repeats + warmup) / repeats  # the counter includes the warm-up
        entries.append(
            {
                "work": asdict(work),
                "figures": measured,
                "limits": None,
                "watts": watts,
                "joules_per_token": None if joules is None else joules / generated,
                "cost_per_million": None if price_per_hour is None else cost_per_million(price_per_hour, speed),
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


def cost_per_million(price_per_hour: float, output_tok_s: float) -> float:
    """Cost of a million generated tokens, including prompts, on a fully used machine with this price and speed."""
    return price_per_hour / 3600 / output_tok_s * 1e6
