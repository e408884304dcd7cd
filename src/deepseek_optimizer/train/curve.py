"""The loss curve of a training run, as JSON and as a PNG image. Both files are written atomically."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback

from ..checkpoint.atomic import atomic_file
from ..errors import CheckpointError, MissingPackageError

JSON_NAME, PNG_NAME = "loss.json", "loss.png"
_NAMES: Final = {
    "loss": "loss", "eval_loss": "eval_loss", "eval_kl": "eval_kl", "eval_accepted": "eval_accepted",
    "learning_rate": "learning_rate", "grad_norm": "grad_norm", "num_input_tokens_seen": "tokens", "epoch": "epoch",
}  # fmt: skip
# Minimum seconds between two writes of the JSON file, which wait for the disk, and of the image, which takes 0.3 s to draw.
_WRITE_SECONDS, _DRAW_SECONDS = 5.0, 30.0


class LossCurve(TrainerCallback):
    """Records the values that Trainer logs, one point per step: step, epoch, loss, eval_loss, eval_kl, eval_accepted,
    learning_rate, grad_norm, tokens and seconds. A point omits values that were not logged at its step.

    `loss.json` is written every few seconds, and after each evaluation and each save; `loss.png` is redrawn on those two
    occasions if it is older than 30 seconds. Both are written at the end.

    Args:
        directory: the directory to write to.
        resume: continue an existing curve, dropping points after the step from which training resumes.

    Raises:
        MissingPackageError: matplotlib is not installed.
        CheckpointError: the existing curve cannot be read.
    """

    def __init__(self, directory: str | Path, resume: bool = False) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingPackageError("a plot of the loss", "matplotlib", "train")
        self._json, self._png = Path(directory) / JSON_NAME, Path(directory) / PNG_NAME
        self.points: list[dict[str, float]] = read_points(self._json) if resume and self._json.is_file() else []
        self._before = 0.0  # seconds of the run that is resumed
        self._started = self._written = time.monotonic()
        self._drawn = -math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.points = [point for point in self.points if point["step"] <= state.global_step]
        self._before = max((point.get("seconds", 0.0) for point in self.points), default=0.0)
        self._started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        values = {ours: float((logs or {})[theirs]) for theirs, ours in _NAMES.items() if theirs in (logs or {})}
        if not values.keys() & {"loss", "eval_loss"}:
            return
        if not self.points or self.points[-1]["step"] != state.global_step:
            self.points.append({"step": state.global_step, "seconds": 0.0})
        self.points[-1].update(values)
        self.points[-1]["seconds"] = round(self._before + time.monotonic() - self._started, 3)
        if time.monotonic() - self._written >= _WRITE_SECONDS:
            self._write()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_all(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_all(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._drawn = -math.inf
        self._write_all(state)

    def _write_all(self, state: Any) -> None:
        if state.is_world_process_zero and self.points:
            self._write()
            if time.monotonic() - self._drawn >= _DRAW_SECONDS:
                draw(self.points, self._png)
                self._drawn = time.monotonic()

    def _write(self) -> None:
        points = [{name: _json_value(name, value) for name, value in point.items()} for point in self.points]
        with atomic_file(self._json) as file:
            file.write(json.dumps({"points": points}, indent=1).encode())
        self._written = time.monotonic()


def _json_value(name: str, value: float) -> float | int | None:
    if not math.isfinite(value):
        return None  # JSON has no NaN
    return int(value) if name in ("step", "tokens") else value


def read_points(file: Path) -> list[dict[str, float]]:
    """Reads the points of a `loss.json` file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        points = json.loads(file.read_text(encoding="utf-8"))["points"]
        return [{name: math.nan if value is None else float(value) for name, value in point.items()} for point in points]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"is not a valid loss curve ({error}); delete it", file=file) from error


def draw(points: list[dict[str, float]], file: Path) -> None:
    """Draws the loss, and below it the learning rate, by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(8, 5),
    )
    FigureCanvasAgg(figure)  # pyplot would have global state and might open a display
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axis, name, label, style in (
        (loss, "loss", "training", "-"), (loss, "eval_loss", "evaluation", "o-"), (rate, "learning_rate", "learning rate", "-"),
    ):  # fmt: skip
        shown = [(point["step"], point[name]) for point in points if math.isfinite(point.get(name, math.nan))]
        if shown:
            axis.plot(*zip(*shown, strict=True), style, label=label, markersize=3, linewidth=1.2)
    loss.set_ylabel("loss (nats per token)")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    for axis in (loss, rate):
        axis.grid(alpha=0.3)
    if loss.lines:
        loss.legend()
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.1, top=0.97, hspace=0.08)
    with atomic_file(file) as opened:
        figure.savefig(opened, format="png", dpi=120)
