"""A bar for training, with what a person wants to see of it."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

import psutil
from transformers import TrainerCallback

_STEPS = 20  # that the speed shown is the mean of


class ProgressBar(TrainerCallback):
    """Steps, time left, loss, tokens a second and this process's memory, on stderr where someone can see it, else nothing."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._times: deque[tuple[float, float]] = deque(maxlen=_STEPS + 1)  # (when, tokens seen)
        self._loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not sys.stderr.isatty() or not state.is_world_process_zero:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._times.append((time.monotonic(), state.num_input_tokens_seen))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._times.append((time.monotonic(), state.num_input_tokens_seen))
            self._bar.update(self._task, completed=state.global_step, description=self._said())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._bar is None or not logs:
            return
        if "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.4f}"
        elif "eval_loss" in logs:
            self._bar.console.print(
                f"step {state.global_step:,}: evaluation loss {float(logs['eval_loss']):.4f}", highlight=False
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; also where training ends by an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _said(self) -> str:
        (begun, first), (now, last) = self._times[0], self._times[-1]
        speed = f"{(last - first) / max(now - begun, 1e-9):,.0f} tokens/s" if last > first else ""
        memory = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
        return "  ".join(part for part in (self._loss, speed, memory) if part)
