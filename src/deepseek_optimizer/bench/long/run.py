"""`dso bench --long` as a function: every attention mode on the same texts, each mode in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...integration.load.resolve import resolve
from ...versions import versions
from ..background import BackgroundLoad
from ..hardware import cpu_name, machine_memory_bytes, usable_cpus
from ..metrics import samples
from ..runs import Run
from .tasks import TASKS

SCHEMA = 1  # of the report; increased when a key changes its meaning
MODES = ("flash", "sliding", "sparse")
LENGTHS = (4096, 8192, 16384, 32768)
MIN_LENGTH = 1024  # tokens; some tasks do not fit into fewer

Line = dict[str, Any]  # one line of a side's output


@dataclass(frozen=True)
class LongRequest:
    """What to measure.

    Attributes:
        model: directory, .gguf file or hub name.
        fields: of `DeepSeekConfig`; `context_extension` without `context_length` extends to the longest of the lengths.
        lengths: tokens of prompt and answer together.
        modes: attention modes, values of `attention_optimization`.
        tasks: names in `TASKS`. samples: number per task and length; the facts asked for are spread evenly over the text.
    """

    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    lengths: Sequence[int] = LENGTHS
    modes: Sequence[str] = MODES
    tasks: Sequence[str] = tuple(TASKS)
    samples: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values, known in (("modes", self.modes, MODES), ("tasks", self.tasks, TASKS)):
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise ConfigError(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
        if min(self.lengths, default=0) < MIN_LENGTH:
            raise ConfigError(
                f"lengths: expected {MIN_LENGTH} tokens or more, got {', '.join(map(str, self.lengths)) or 'none'}"
            )
        if self.samples < 1:
            raise ConfigError(f"samples: expected 1 or more, got {self.samples}")

    def config(self, **fields: Any) -> dict[str, Any]:
        """Fields of `DeepSeekConfig`, with these added."""
        merged = {**self.fields, **fields}
        if merged.get("context_extension"):
            merged.setdefault("context_length", max(self.lengths))
        return merged

    def command(self, model: Path, mode: str) -> list[str]:
        """The command that measures one mode."""
        options = {
            "config": json.dumps(self.config(attention_optimization=mode)), "lengths": ",".join(map(str, self.lengths)),
            "tasks": ",".join(self.tasks), "samples": self.samples, "seed": self.seed,
        }  # fmt: skip
        side = [sys.executable, "-m", "deepseek_optimizer.bench.sides.long", str(model)]
        return [*side, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def run(
    request: LongRequest,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
    side: Callable[[Sequence[str]], Iterator[Line]] | None = None,
) -> dict[str, Any]:
    """Keys: schema, date, seconds, load, model, cpu, machine_memory_bytes, versions, config, tasks, samples, seed, sides (mode
    -> backend, threads, load_s; empty if it failed), rows. A row: mode, length, and either "error", the reason why nothing was
    measured, or None there and "scores" (task -> one per sample), "accuracy" (task -> mean), "mean" (of all tasks), "ttft_s",
    "prefill_tok_s", "decode_tok_s" (medians), "memory_bytes" (peak above the loaded model).

    Args:
        progress: called with the number of tokens done and the total.
        note: called with each step as text.
        side: runs a command and yields its lines; replaced by tests.

    Raises:
        ConfigError: a field is invalid, raised before anything is started; or no mode is available, with the reason.
        CheckpointError: the model does not exist.
    """
    DeepSeekConfig(**request.config())
    date, began = datetime.now().astimezone(), time.perf_counter()
    model = resolve(request.model)
    done, each = 0, request.samples * len(request.tasks)
    total = len(request.modes) * each * sum(request.lengths)

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress(min(done, total), total)

    advance(0)
    background = BackgroundLoad(usable_cpus())
    sides: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for i, mode in enumerate(request.modes):
        note(mode)
        lines = []
        for line in (side or printed)(request.command(model, mode)):
            lines.append(line)
            advance(line["length"] if "task" in line else 0)
        sides[mode] = next((line for line in lines if "backend" in line), {})
        rows += rows_of(mode, request.lengths, lines)
        advance((i + 1) * each * sum(request.lengths) - done)  # skipped work takes no more time
    if not any(sides.values()):
        raise ConfigError(rows[0]["error"])
    return {
        "schema": SCHEMA,
        "date": date.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - began,
        "load": background.report(),
        "model": str(request.model),
        "cpu": cpu_name(),
        "machine_memory_bytes": machine_memory_bytes(),
        "versions": versions(),
        "config": dict(request.fields),
        "tasks": list(request.tasks),
        "samples": request.samples,
        "seed": request.seed,
        "sides": sides,
        "rows": rows,
    }


def printed(command: Sequence[str]) -> Iterator[Line]:
    """Yields the JSON lines that a process prints; if it fails, a last line with the reason."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace")
        assert process.stdout is not None
        try:
            for text in process.stdout:
                if text.startswith("{"):
                    yield json.loads(text)
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdout.close()
            code = process.wait()
        if code:
            errors.seek(0)
            message = (errors.read().strip().splitlines() or ["no reason given"])[-1]
            reason = f"killed by signal {-code}, probably out of memory" if code < 0 else message
            yield {"error": reason}


def rows_of(mode: str, lengths: Sequence[int], lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row per length, from the output of a mode's side."""
    failure = next((line["error"] for line in lines if "error" in line and "length" not in line), "no result from the side")
    return [_row(mode, length, [line for line in lines if line.get("length") == length], failure) for length in lengths]


def _row(mode: str, length: int, lines: Sequence[Line], failure: str) -> dict[str, Any]:
    """failure: the error if this length was not completed."""
    last = next((line for line in lines if "task" not in line), {"error": failure})
    row: dict[str, Any] = {"mode": mode, "length": length, "error": last.get("error")}
    if row["error"] is not None:
        return row
    answers = [line for line in lines if "task" in line]
    scores: dict[str, list[float]] = {}
    for line in answers:
        scores.setdefault(line["task"], []).append(line["score"])
    accuracy = {task: statistics.fmean(values) for task, values in scores.items()}
    medians = {name: statistics.median(v) for name, v in samples([Run(**line["run"]) for line in answers]).items()}
    return {
        **row,
        "scores": scores,
        "accuracy": accuracy,
        "mean": statistics.fmean(accuracy.values()),
        "ttft_s": medians["ttft_ms"] / 1e3,
        "prefill_tok_s": medians["prefill_tok_s"],
        "decode_tok_s": medians["decode_tok_s"],
        "memory_bytes": last["memory_bytes"],
    }
