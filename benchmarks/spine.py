"""Transformers in bf16 against the optimized model, the same work, sides in turns: how many times faster and smaller.

Data, and how one comparison is measured; `run.py` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deepseek_optimizer.bench.against import alternate, ratio_rows
from deepseek_optimizer.bench.peers.base import own_command
from deepseek_optimizer.bench.work import Work

from .models import TITLES, model

FIGURES = ("prefill_tok_s", "decode_tok_s", "to_first_token_s", "memory_bytes")


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    name: for the command line and the results.
    forms: of the optimized model, by what they are called.
    options: of every side.
    """

    name: str
    title: str
    model: str
    forms: dict[str, str]
    work: Work
    options: tuple[str, ...] = ()

    def quick(self) -> Comparison:
        return replace(self, work=Work(32, 4))


_LOSSLESS = {"q4_1 (lossless)": "gguf", "int4": "int4", "int8": "int8", "bf16": "bf16"}
_START = Work(16, 1)

SPINE = (
    Comparison("spine-smol", "512 in", "smol", _LOSSLESS, Work(512, 33)),
    Comparison("spine-r1q15", "512 in", "r1q15", {"int4": "int4"}, Work(512, 17)),
    Comparison("spine-r1q15-warm", "warm start", "r1q15", {"int4": "int4"}, _START, ("--repeats", "0")),
    Comparison("spine-r1q15-cold", "cold start", "r1q15", {"int4": "int4"}, _START, ("--repeats", "0", "--cold")),
)


def measure(c: Comparison, *, threads: int, rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """{"work", "rows": one a figure and an optimized side, as `ratio_row` makes them}."""
    sides = {"transformers": _side(c, "transformers", "bf16", threads)}
    sides.update({label: _side(c, "optimized", form, threads) for label, form in c.forms.items()})
    found = alternate(sides, rounds, note)
    return {"work": f"{TITLES[c.model]}, {c.title}", "rows": ratio_rows(found, "transformers", FIGURES)}


def _side(c: Comparison, side: str, form: str, threads: int) -> list[str]:
    return [*own_command(side, model(c.model, form), c.work, threads=threads, repeats=3, warmup=1), *c.options]
