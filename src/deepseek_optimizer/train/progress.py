"""The progress bar of training."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from typing import Any

import psutil
from transformers import TrainerCallback

from ..system.progress import Progress, show_progress

_STEPS = 20  # the speed shown is the mean of this many steps


class ProgressBar(TrainerCallback):
    """Shows steps, remaining time, loss, tokens per second and the memory of this process on stderr; see `show_progress`."""

    def __init__(self) -> None:
        self._shown = ExitStack()
        self._progress: Progress | None = None
        self._times: deque[tuple[float, float]] = deque(maxlen=_STEPS + 1)  # (time, tokens processed)
        self._loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._progress = self._shown.enter_context(show_progress("Training"))
        self._progress(state.global_step, state.max_steps)
        self._times.append((time.monotonic(), state.num_input_tokens_seen))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._times.append((time.monotonic(), state.num_input_tokens_seen))
            self._progress(state.global_step, state.max_steps, self._note())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._progress is None or not logs:
            return
        if "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.4f}"
        elif "eval_loss" in logs:
            self._progress.say(f"step {state.global_step:,}: evaluation loss {float(logs['eval_loss']):.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Removes the progress bar. Safe to call after an error."""
        self._progress = None
        self._shown.close()

    def _note(self) -> str:
        (begun, first), (now, last) = self._times[0], self._times[-1]
        speed = f"{(last - first) / max(now - begun, 1e-9):,.0f} tokens/s" if last > first else ""
        memory = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
        return "  ".join(part for part in (self._loss, speed, memory) if part)
