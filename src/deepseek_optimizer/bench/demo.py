"""The demo: SmolLM2-135M-Instruct answers a question, and a table compares Transformers with the optimized model.

Each side runs in a separate process, the sides alternate, and medians of the rounds are shown. Transformers loads the
dequantized weights as a bf16 checkpoint, the format it loads fastest; the lossless side loads the GGUF file; int4 packs the
bf16 checkpoint while loading, without calibration. Each step is announced on stderr.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.cpu import thread_limits
from ..system.progress import Progress, show_progress
from ..versions import versions
from . import smollm2
from .against import run_json
from .hardware import cpu_name
from .sides.answer import QUESTION
from .unoptimized_model import dequantized

if TYPE_CHECKING:
    from rich.console import Console

TOKENS = 64  # generated to time decoding and to compare
ROUNDS = 3
ENOUGH_S = 200  # of measuring: no further round begins that would take longer, unless the caller says how many there are


def run(*, rounds: int | None = None, threads: int | None = None, show: bool = True) -> dict[str, Any]:
    """Downloads the model, answers, and measures.

    Args:
        rounds: number of processes per side; None: three, or fewer on a slow machine.
        threads: for every side; None: as many as a model uses by default, see `thread_limits`.
        show: print the answer and the table.

    Returns:
        {"cpu", "threads", "model", "question", "versions", "rounds", "sides": {name: medians}}; times in seconds, memory in
        bytes.
    """
    from rich.console import Console

    console = Console(highlight=False)
    threads = threads or thread_limits()[0]
    with _step("Downloading SmolLM2-135M-Instruct (93 MB), unless it is cached"):
        gguf = smollm2.fetch()
    with _step("Writing a bf16 checkpoint, the format that Transformers loads fastest, unless it is cached"):
        bf16 = dequantized(gguf)
    if show:
        _say("Loading the optimized model to answer a question")
        console.print(f"[bold]{QUESTION}[/]")
        _answer(gguf, threads)
    sides = {
        "Transformers bf16": ["transformers", str(bf16)],
        "lossless Q4_1": ["optimized", str(gguf)],
        "int4": ["optimized", str(bf16), "--precision", "int4"],
    }
    _say(f"Measuring {', '.join(sides)} in alternation, each in a separate process")
    common = ["--tokenizer", str(bf16), "--threads", str(threads), "--tokens", str(TOKENS)]
    measured, done = _measure(sides, common, rounds)
    result = {
        "cpu": cpu_name(),
        "threads": threads,
        "model": gguf.name,
        "question": QUESTION,
        "versions": versions(),
        "rounds": done,
        "sides": measured,
    }
    if show:
        _print(console, result)
    return result


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Announces a step, and shows that it is still running if it takes long."""
    _say(what)
    with show_progress(what.partition(",")[0]):
        yield


def _answer(gguf: Path, threads: int) -> None:
    from ..chat.conversation import prompt_ids
    from ..chat.stream import write_now
    from ..optimized_model import load_model, load_tokenizer
    from .generate_answer import answer

    tokenizer = load_tokenizer(gguf)
    ids = prompt_ids(tokenizer, [{"role": "user", "content": QUESTION}])
    answer(load_model(gguf, threads=threads), tokenizer, ids, write_now, do_sample=False)
    write_now("\n\n")


def _measure(sides: dict[str, list[str]], common: list[str], rounds: int | None) -> tuple[dict[str, dict[str, Any]], int]:
    """Medians of each side, with how many of the first side's tokens it would choose, too; and the number of rounds."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, show_progress("Measuring") as progress:
        reference = Path(folder) / "reference.json"
        for turn in range(rounds or ROUNDS):
            if rounds is None and turn and _too_long(time.monotonic() - start, turn):
                break
            _round(sides, common, reference, samples, progress, (turn, rounds or ROUNDS))
    baseline = next(iter(samples.values()))
    return {name: _median(runs, baseline[0]["answer"]) for name, runs in samples.items()}, len(baseline)


def _too_long(seconds: float, rounds: int) -> bool:
    """Whether one round more would end beyond ENOUGH_S, after some that took these seconds together."""
    return seconds * (rounds + 1) / rounds > ENOUGH_S


def _round(
    sides: dict[str, list[str]],
    common: list[str],
    reference: Path,
    samples: dict[str, list[dict[str, Any]]],
    progress: Progress,
    turn: tuple[int, int],
) -> None:
    """Runs every side once. turn: the number of this round, and of all."""
    number, rounds = turn
    for i, (name, arguments) in enumerate(sides.items()):
        progress(number * len(sides) + i, rounds * len(sides), f"round {number + 1} of {rounds}: {name}")
        extra = ["--reference", str(reference)] if reference.exists() else []
        samples[name].append(_run_side([*arguments, *common, *extra]))
        if not reference.exists():
            reference.write_text(json.dumps(samples[name][0]["ids"]), encoding="utf-8")
            samples[name][0]["agreed"] = None


def _run_side(arguments: list[str]) -> dict[str, Any]:
    return run_json([sys.executable, "-m", "deepseek_optimizer.bench.sides.answer", *arguments])


def _median(runs: list[dict[str, Any]], baseline: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in ("load_s", "first_token_s", "tokens_per_s", "memory_bytes", "agreed"):
        values = [run[name] for run in runs if run.get(name) is not None]
        figures[name] = statistics.median(values) if values else None
    answer = runs[-1]["answer"]
    return {**figures, "of": len(runs[-1]["ids"]), "answer": answer, "same_answer": answer == baseline}


def _print(console: Console, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{result['model']} on {result['cpu']}, {result['threads']} threads", title_justify="left")
    table.add_column()
    for name in result["sides"]:
        table.add_column(name, justify="right")
    sides = list(result["sides"].values())
    for label, key, form in _ROWS:
        table.add_row(label, *(_cell(side[key], sides[0][key], form) for side in sides))
    table.add_row("same answer", *("yes" if side["same_answer"] else "no" for side in sides))
    table.add_row("same next token", *("-" if s["agreed"] is None else f"{s['agreed']:.0f} of {s['of']}" for s in sides))
    console.print(table)
    console.print(
        f"Medians of {result['rounds']} processes per side, which alternate; in parentheses: speed and memory relative to the "
        f"first column. Memory: peak above a process that has only imported the packages. First token: of the question above, "
        f"on a model just loaded. Tokens per second and the last row: {TOKENS} tokens of another answer, greedy."
    )


# Label, figure, and its format: the value, and its relation to the first column.
_ROWS: list[tuple[str, str, Callable[[float, float], tuple[str, str]]]] = [
    ("load, s", "load_s", lambda v, base: (f"{v:.2f}", _faster(base / v))),
    ("first token, ms", "first_token_s", lambda v, base: (f"{v * 1e3:.0f}", _faster(base / v))),
    ("tokens per second", "tokens_per_s", lambda v, base: (f"{v:.1f}", _faster(v / base))),
    ("memory, MB", "memory_bytes", lambda v, base: (f"{v / 1e6:.0f}", f"{v / base:.0%}")),
]


def _faster(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2g}x"


def _cell(value: float | None, base: float | None, form: Callable[[float, float], tuple[str, str]]) -> str:
    if not value or not base:
        return "-"
    text, comparison = form(value, base)
    return text if value == base else f"{text} ({comparison})"
