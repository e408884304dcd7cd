"""A loaded model over its works: figures, what they mean against the machine, energy, cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .energy import Energy
from .figures import figures, samples
from .limits import Limits, cost_per_million
from .runs import repeated
from .traffic import traffic_of
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
    """One entry a work: {"work", "figures", "limits", "watts", "joules_per_token", "cost_per_million"}; None where unknown.
    `hold_against` fills in "limits".

    Args:
        model: a Transformers model, optimised or not.
        price_per_hour: of this machine, in whatever currency the cost is wanted.
    """
    entries = []
    for work in works:
        note(str(work))
        energy = Energy()
        runs = list(repeated(model, work, repeats=repeats, warmup=warmup))
        joules, watts = energy.joules, energy.watts
        found = figures(samples(runs))
        speed = found["output_tok_s"]["p50"]
        generated = sum(run.generated for run in runs) * (repeats + warmup) / repeats  # the counter saw the warm-up too
        entries.append(
            {
                "work": asdict(work),
                "figures": found,
                "limits": None,
                "watts": watts,
                "joules_per_token": None if joules is None else joules / generated,
                "cost_per_million": None if price_per_hour is None else cost_per_million(price_per_hour, speed),
            }
        )
    return entries


def hold_against(limits: Limits, model: Any, entries: Sequence[dict[str, Any]]) -> None:
    """Sets each entry's "limits". A step of its own: measuring the machine takes memory, which is not the model's."""
    traffic = traffic_of(model)
    for entry in entries:
        found = entry["figures"]
        decode = found["decode_tok_s"]["p50"] if "decode_tok_s" in found else None
        entry["limits"] = limits.share(traffic, Work(**entry["work"]), found["ttft_ms"]["p50"], decode)
