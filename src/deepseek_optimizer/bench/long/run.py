"""The whole of `dso bench --long`: every mode of attention over the same texts, each mode in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...integration.load.resolve import resolve
from ...versions import versions
from ..figures import samples
from ..process import cpu_name
from ..runs import Run
from .tasks import TASKS

SCHEMA = 1  # of the report; goes up where a name changes its meaning
MODES = ("flash", "sliding", "sparse")
LENGTHS = (4096, 8192, 16384, 32768)
LEAST = 1024  # tokens; below, some task does not fit in

Line = dict[str, Any]  # what a side prints


@dataclass(frozen=True)
class LongRequest:
    """What to measure.

    Attributes:
        model: directory, .gguf file or hub name.
        fields: of `DeepSeekConfig`; with `context_extension` alone there is room for the longest of the lengths.
        lengths: tokens of prompt and answer together.
        modes: of attention: values of `attention_optimization`.
        tasks: names in `TASKS`. samples: of each, at each length; what is asked for stands evenly spread over the text.
    """

    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    lengths: Sequence[int] = LENGTHS
    modes: Sequence[str] = MODES
    tasks: Sequence[str] = tuple(TASKS)
    samples: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, given, known in (("modes", self.modes, MODES), ("tasks", self.tasks, TASKS)):
            unknown = [value for value in given if value not in known]
            if unknown or not given:
                raise ConfigError(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
        if min(self.lengths, default=0) < LEAST:
            raise ConfigError(f"lengths: expected {LEAST} tokens or more, got {', '.join(map(str, self.lengths)) or 'none'}")
        if self.samples < 1:
            raise ConfigError(f"samples: expected 1 or more, got {self.samples}")

    def config(self, **fields: Any) -> dict[str, Any]:
        """Fields of `DeepSeekConfig`, these among them."""
        found = {**self.fields, **fields}
        if found.get("context_extension"):
            found.setdefault("context_length", max(self.lengths))
        return found

    def command(self, model: Path, mode: str) -> list[str]:
        """What starts a mode's side."""
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
    """Keys: schema, model, cpu, versions, config, tasks, samples, seed, sides (mode -> backend, threads, load_s; or nothing),
    rows. A row: mode, length, and either "error", which says why nothing was measured, or that as None and "scores" (task ->
    one a sample), "accuracy" (task -> mean), "mean" (of all tasks), "ttft_s", "prefill_tok_s", "decode_tok_s" (medians),
    "memory_bytes" (peak above the loaded model).

    Args:
        progress: takes how many tokens are done, and of how many.
        note: takes what is going on.
        side: a command's lines, for tests.

    Raises:
        ConfigError: a field is wrong, before anything is started; or no mode can be had, with the reason.
        CheckpointError: there is no such model.
    """
    DeepSeekConfig(**request.config())
    model = resolve(request.model)
    done, each = 0, request.samples * len(request.tasks)
    total = len(request.modes) * each * sum(request.lengths)

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress(min(done, total), total)

    advance(0)
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
        advance((i + 1) * each * sum(request.lengths) - done)  # what was left out takes no more time
    if not any(sides.values()):
        raise ConfigError(rows[0]["error"])
    return {
        "schema": SCHEMA,
        "model": str(request.model),
        "cpu": cpu_name(),
        "versions": versions(),
        "config": dict(request.fields),
        "tasks": list(request.tasks),
        "samples": request.samples,
        "seed": request.seed,
        "sides": sides,
        "rows": rows,
    }


def printed(command: Sequence[str]) -> Iterator[Line]:
    """The lines of JSON that a process prints, as they come; where it fails, one more that says so."""
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
            said = (errors.read().strip().splitlines() or ["no reason given"])[-1]
            reason = f"killed by signal {-code}, likely for its memory" if code < 0 else said
            yield {"error": reason}


def rows_of(mode: str, lengths: Sequence[int], lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One a length, out of what a mode's side printed."""
    ended = next((line["error"] for line in lines if "error" in line and "length" not in line), "the side said nothing of it")
    return [_row(mode, length, [line for line in lines if line.get("length") == length], ended) for length in lengths]


def _row(mode: str, length: int, lines: Sequence[Line], ended: str) -> dict[str, Any]:
    """ended: what is wrong where the length never came to its end."""
    last = next((line for line in lines if "task" not in line), {"error": ended})
    row: dict[str, Any] = {"mode": mode, "length": length, "error": last.get("error")}
    if row["error"] is not None:
        return row
    answers = [line for line in lines if "task" in line]
    scores: dict[str, list[float]] = {}
    for line in answers:
        scores.setdefault(line["task"], []).append(line["score"])
    accuracy = {task: statistics.fmean(values) for task, values in scores.items()}
    found = {name: statistics.median(v) for name, v in samples([Run(**line["run"]) for line in answers]).items()}
    return {
        **row,
        "scores": scores,
        "accuracy": accuracy,
        "mean": statistics.fmean(accuracy.values()),
        "ttft_s": found["ttft_ms"] / 1e3,
        "prefill_tok_s": found["prefill_tok_s"],
        "decode_tok_s": found["decode_tok_s"],
        "memory_bytes": last["memory_bytes"],
    }
