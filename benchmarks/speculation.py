"""Drafts against plain decoding of the same model, in turns: what free drafts gain where they hold, what they cost where none
does, and what a model's own MTP layers are worth.

Data, and how a row is measured; `run.py` runs them.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.against import run_json
from deepseek_optimizer.bench.sections import number
from deepseek_optimizer.bench.work import Work

from .drafts import PLAIN
from .models import model
from .verdict import MISSED, REACHED


@dataclass(frozen=True)
class Speculation:
    """Attributes:
    name: for the command line and the results.
    model: of `models.TITLES`, or "tiny-v3": the trained one, where DSO_TINY_V3 or ../shared/models has it.
    options: of `drafts.py`.
    at_least: side -> the least that its speed may be of plain decoding's.
    """

    name: str
    title: str
    model: str
    form: str
    work: Work
    options: tuple[str, ...]
    at_least: Mapping[str, float]
    repeats: int = 2

    def quick(self) -> Speculation:
        return replace(self, work=Work(min(self.work.prompt, 32), 12), repeats=1)


_FORCED = ("--agree", "0.8", "0")
TRAINED = "tiny-v3"

SPECULATION = (
    Speculation(
        "spec-r1q15", "r1q15, 3 free drafts", "r1q15", "int4", Work(512, 129), _FORCED, {"80% hold": 2.0, "0% hold": 0.97}
    ),
    Speculation(
        "spec-v2l6", "v2l6, 3 free drafts", "v2l6", "int4", Work(512, 129), _FORCED, {"80% hold": 1.25, "0% hold": 0.97}
    ),
    Speculation(
        "mtp-tiny-v3", "tiny-v3, its MTP layer", TRAINED, "bf16", Work(256, 257), ("--mtp", "1", "2", "3"), {}, repeats=8
    ),
)


def _place(row: Speculation) -> Path:
    if row.model != TRAINED:
        return model(row.model, row.form)
    given = os.environ.get("DSO_TINY_V3")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "models" / TRAINED
    if not (path / "config.json").exists():
        raise SystemExit(f"{TRAINED} is not at {path}; set DSO_TINY_V3 to its folder")
    return path


def _command(row: Speculation, threads: int) -> list[str]:
    path = _place(row)
    texts = ["--texts", str(path / "val_tokens.npy")] if row.model == TRAINED else []
    sizes = {"prompt": row.work.prompt, "new": row.work.new, "threads": threads, "repeats": row.repeats}
    numbers = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "benchmarks.drafts", str(path), *row.options, *texts, *numbers]


def measure(row: Speculation, *, threads: int, rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """{"title", "model", "work", "rows": one a way of drafting, with the ratios of neighboring runs}."""
    found = []
    for turn in range(rounds):
        note(f"round {turn + 1} of {rounds}")
        found.append(run_json(_command(row, threads)))
    rows = [_row(row, side, found) for side in found[0] if side != PLAIN]
    return {"title": row.title, "model": row.model, "work": asdict(row.work), "rows": rows}


def _row(row: Speculation, side: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = [p for f in found for p in zip(f[PLAIN]["decode_tok_s"], f[side]["decode_tok_s"], strict=True)]
    ratios = [b / a for a, b in pairs]
    better, least = statistics.median(ratios), row.at_least.get(side)
    last = found[-1][side]
    return {
        "name": side,
        "plain": statistics.median(a for a, _ in pairs),
        "side": statistics.median(b for _, b in pairs),
        "better": better,
        "lowest": min(ratios),
        "highest": max(ratios),
        "at_least": least,
        "verdict": None if least is None else REACHED if better >= least else MISSED,
        "accepted_length": statistics.median(f[side]["accepted_length"] for f in found),
        **{name: last[name] for name in ("acceptance", "rounds", "drafted", "own_estimate", "chosen")},
    }


def lines(entry: Mapping[str, Any]) -> list[str]:
    """A measured row in the terminal."""
    return [entry["title"], *(_line(row) for row in entry["rows"])]


def _line(row: Mapping[str, Any]) -> str:
    speed = f"{number(row['plain'], 'tok/s')} -> {number(row['side'], 'tok/s')}"
    times = f"{row['better']:.2f}x ({row['lowest']:.2f} - {row['highest']:.2f})"
    asked = "" if row["at_least"] is None else f", at least {row['at_least']:g}x: {row['verdict']}"
    held = ", ".join("-" if a is None else f"{a:.0%}" for a in row["acceptance"])
    return f"  {row['name']:16} {speed:28} {times}{asked}; {row['accepted_length']:.2f} tokens a round, hold: {held}"
