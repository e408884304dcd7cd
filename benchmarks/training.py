"""Training beside Transformers' Trainer: time of a step, peak memory, and what the loss loses: `make bench-train`.

    python -m benchmarks.training [step lora r1q15 quality] [--rounds 2] [--quick]

Sides in turns, each in a process of its own (`training_side.py`), on one machine; nothing else may run meanwhile. Bars are
issue 7's. `--quick` shows whether everything works, not how fast it is, and keeps nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deepseek_optimizer.backends.cpu.native import cpu_description
from deepseek_optimizer.bench.against import run_json

from . import results
from .command import asked
from .models import TITLES, model
from .verdict import MISSED, REACHED

GB = 1e9


@dataclass(frozen=True)
class Side:
    """Attributes:
    name: of `training_side.SIDES`. label: what it is called.
    fields: of DeepSeekTrainingArguments. options: of `training_side`, for this side alone.
    """

    name: str
    label: str
    fields: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bar:
    """The figure of a side may be so many times that of another, or so much.

    Attributes:
        figure: "seconds" (median of a step), "peak_bytes", "eval_after" (nats a token).
        most: times the other side's, or in the figure's unit where `against` is None. For "eval_after" the distance from 1
            counts both ways.
    """

    figure: str
    side: str
    most: float
    against: str | None = None


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    model: str
    sides: tuple[Side, ...]
    bars: tuple[Bar, ...]
    options: tuple[str, ...] = ()
    once: bool = False  # rounds would say the same


FP32, AUTOCAST = Side("fp32", "Transformers fp32"), Side("autocast", "Transformers bf16 autocast")
OURS = Side("ours", "ours")
INT8 = Side("ours", "ours, int8 moments", {"optimizer_state": "int8"})
STOCHASTIC = Side(
    "ours", "ours, int8 moments, stochastic rounding", {"optimizer_state": "int8", "master_weights": "stochastic"}
)
FP8 = Side("ours", "ours, FP8 emulated", {"fp8_enabled": True, "fp8_backend": "emulate"})
LORA = Side("ours", "ours, LoRA, recompute", {"activation_memory": "recompute"}, ("--lora", "16"))
PACKED = Side("ours", "ours, LoRA on int4", {"activation_memory": "recompute"}, ("--lora", "16", "--precision", "int4"))


def step_bars() -> tuple[Bar, ...]:
    """How many times as fast a step must be depends on the machine: where there is AMX, bf16 gains more."""
    amx = any(name.startswith("amx") for name in cpu_description()["features"])
    fp32, autocast = (4.0, 2.0) if amx else (2.8, 1.6)
    return (
        Bar("seconds", OURS.label, 1 / fp32, FP32.label),
        Bar("seconds", OURS.label, 1 / autocast, AUTOCAST.label),
        Bar("peak_bytes", OURS.label, 0.40, FP32.label),
        Bar("peak_bytes", STOCHASTIC.label, 0.33, FP32.label),
    )


def rows() -> dict[str, Row]:
    whole = ("--rows", "2", "--tokens", "1024")
    one = ("--rows", "1", "--tokens", "1024", "--steps", "3")
    # 200 steps of 2,048 tokens would take fp32 an hour on two cores: the same number of shorter steps
    short = ("--rows", "1", "--tokens", "256", "--steps", "200", "--evaluate", "64")
    four = (FP32, AUTOCAST, OURS, STOCHASTIC)
    five = (FP32, OURS, INT8, STOCHASTIC, FP8)
    close = tuple(Bar("eval_after", s.label, most, FP32.label) for s, most in ((OURS, 0.003), (INT8, 0.003), (FP8, 0.005)))
    lora, packed = Bar("peak_bytes", LORA.label, 1.5 * GB), Bar("peak_bytes", PACKED.label, 4 * GB)
    found = (
        Row("step", "2 x 1,024 tokens per step", "smol", four, step_bars(), (*whole, "--steps", "5")),
        Row("lora", "LoRA, 2 x 1,024 tokens per step", "smol", (LORA,), (lora,), (*whole, "--steps", "3")),
        Row("r1q15", "LoRA on an int4 base, 1,024 tokens per step", "r1q15", (PACKED,), (packed,), one),
        Row("quality", "200 steps of 256 tokens", "smol", five, close, short, once=True),
    )
    return {row.name: row for row in found}


def main() -> None:
    known = rows()
    a = asked(__doc__.splitlines()[0], known, rounds=2)
    facts = a.facts()
    for name in a.names:
        found = measure(known[name], a.rounds, a.quick)
        print("\n".join(lines(found)), flush=True)
        if a.directory:
            results.merge("training", {name: {**facts, **found}}, a.directory)


def measure(row: Row, rounds: int, quick: bool) -> dict[str, Any]:
    """{"title", "sides": label -> {figure: [value of each round]}, "bars": as `judged` makes them}."""
    found: dict[str, dict[str, list[float]]] = {side.label: {} for side in row.sides}
    for turn in range(1 if row.once else rounds):
        for side in row.sides:
            print(f"{row.name}: round {turn + 1}, {side.label}", file=sys.stderr)
            for figure, value in figures(run_json(command(row, side, quick))).items():
                found[side.label].setdefault(figure, []).append(value)
    return {"title": f"{TITLES[row.model]}, {row.title}", "sides": found, "bars": [judged(bar, found) for bar in row.bars]}


def command(row: Row, side: Side, quick: bool) -> list[str]:
    """Of a side; the last of two equal options counts."""
    path = str(model(row.model, "bf16" if "--precision" not in side.options else "int4"))
    small = ("--tokens", "32", "--steps", "2") if quick else ()
    fields = ("--fields", json.dumps(side.fields))
    return [
        sys.executable,
        "-m",
        "benchmarks.training_side",
        side.name,
        "--model",
        path,
        *row.options,
        *side.options,
        *fields,
        *small,
    ]


def figures(result: dict[str, Any]) -> dict[str, float]:
    """A side's run in figures. The first step also allocates: it doesn't count."""
    taken = result["seconds"][1:] or result["seconds"]
    found = {"seconds": statistics.median(taken), "peak_bytes": result["peak_bytes"]}
    return found | {name: result[name] for name in ("eval_before", "eval_after") if name in result}


def judged(bar: Bar, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The bar, what was measured (median of the rounds' own ratios, lowest, highest), and the verdict."""
    values = found[bar.side][bar.figure]
    if bar.against is not None:
        values = [ours / theirs for ours, theirs in zip(values, found[bar.against][bar.figure], strict=True)]
    value = statistics.median(values)
    kept = abs(value - 1) <= bar.most if bar.figure == "eval_after" else value <= bar.most
    return {**vars(bar), "value": value, "lowest": min(values), "highest": max(values), "verdict": REACHED if kept else MISSED}


def lines(found: dict[str, Any]) -> Iterator[str]:
    yield found["title"]
    for label, values in found["sides"].items():
        shown = {figure: statistics.median(each) for figure, each in values.items()}
        text = f"  {label}: {shown['seconds']:.2f} s a step, peak {shown['peak_bytes'] / GB:.2f} GB"
        if "eval_after" in shown:
            text += f", evaluation loss {shown['eval_before']:.4f} -> {shown['eval_after']:.4f}"
        yield text
    for bar in found["bars"]:
        yield f"  {bar_text(bar)}: {bar['verdict']}"


def bar_text(bar: dict[str, Any]) -> str:
    """A bar in words, with what was measured."""
    value, most, span = bar["value"], bar["most"], f"({bar['lowest']:.2f} - {bar['highest']:.2f})"
    if bar["figure"] == "seconds":
        span = f"({1 / bar['highest']:.2f} - {1 / bar['lowest']:.2f})"
        return f"{bar['side']}: {1 / value:.2f}x as fast as {bar['against']} {span}, at least {1 / most:.2g}x"
    if bar["figure"] == "eval_after":
        return f"{bar['side']}: evaluation loss {value - 1:+.3%} beside {bar['against']}, at most {most:.1%}"
    if bar["against"] is None:
        return f"{bar['side']}: peak {value / GB:.2f} GB, at most {most / GB:g} GB"
    return f"{bar['side']}: {value:.2f}x the peak memory of {bar['against']} {span}, at most {most:.2f}x"


if __name__ == "__main__":
    main()
