"""Whether and on which text a load calibrates, and the rounding of the loaded model on it."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...calibration.built_in import built_in_stretches
from ...calibration.text import LENGTH, read_text, stretches
from ...checkpoint import Checkpoint, PackedCheckpoint, load_tokenizer
from ...config import DeepSeekConfig
from ...errors import CheckpointError, ConfigError
from ...quant import WEIGHED
from ...system.memory import free_memory
from ...system.progress import duration, show_progress
from ..bind.runtime import runtime_of
from ..model.bind_plan import rebind
from .rounding import round_in_place

ENVIRONMENT = "DSO_CALIBRATION"  # "none": the built-in text is not used
BUILT_IN = "built-in text"
LONGEST = 60.0  # seconds that calibration on the built-in text may take
COUNT = 8  # stretches of the built-in text; always the same, so that a load that calibrates gives the same weights
_ROUNDING = 4.5e-7  # seconds of one thread per weight, measured on SmolLM2
_PASSES = 4  # forwards and second moments of the whole text, as forwards by the product that is timed; measured on SmolLM2
UNUSED = "the calibration text was not used, because no matrix is rounded to " + " or ".join(sorted(WEIGHED))


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on. `texts`: token ids, int64 [1, n] each; `source`: BUILT_IN, or the user's file."""

    texts: list[torch.Tensor]
    source: str


def calibration_for(
    checkpoint: Checkpoint,
    settings: DeepSeekConfig,
    formats: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    context: int,
) -> tuple[Calibration | None, list[str]]:
    """The text to calibrate on, if `settings` ask for it and a matrix is rounded to a format that depends on it.

    Args:
        checkpoint: the checkpoint to load.
        settings: the settings of the load.
        formats: the format of each weight; None for plain tensors.
        shapes: their shapes.
        context: the model's context length; stretches are not longer.

    Returns: None if there is nothing to calibrate; and notes for the user.

    Raises:
        ConfigError: the user's text cannot be read, or is too short.
    """
    file = settings.calibration_file
    if settings.calibration is None or settings.kl_budget is not None or isinstance(checkpoint, PackedCheckpoint):
        return None, []
    if not any(format in WEIGHED and _rounds(checkpoint, name, format) for name, format in formats.items()):
        return None, [] if file is None else [UNUSED]
    length = min(LENGTH, context)
    if file is not None:
        return Calibration(stretches(load_tokenizer(checkpoint), read_text(file), length, source=file), file), []
    if os.environ.get(ENVIRONMENT) == "none":
        return None, []
    if not _fits(checkpoint):
        return None, [_without("which needs memory for the original model twice")]
    seconds = estimated_seconds(shapes, formats, COUNT * length)
    if seconds > LONGEST:
        return None, [_without(f"which would take about {duration(seconds)}")]
    try:
        return Calibration(built_in_stretches(load_tokenizer(checkpoint), length, COUNT), BUILT_IN), []
    except (CheckpointError, ConfigError):  # no tokenizer, or one with so many words that the text is too short
        return None, [_without("which needs a tokenizer that fits the built-in text")]


def _without(why: str) -> str:
    return (
        f"rounded without calibration, {why}; for better 4-bit weights, convert the model once with "
        "`dso convert --calibration FILE`"
    )


def without_rounding(settings: DeepSeekConfig) -> dict[str, Any]:
    """The fields of a load that is to be rounded afterwards."""
    return {**settings.to_dict(), "precision": "auto", "formats": None, "calibration": None}


def calibrate(model: Any, settings: DeepSeekConfig, calibration: Calibration) -> None:
    """Rounds a model that was loaded with `without_rounding(settings)`, as `settings` say, and binds its plan again."""
    runtime = runtime_of(model)
    with show_progress(f"Calibrating on {calibration.source}") as progress:
        outcome = round_in_place(model, settings, calibration.texts, progress)
    runtime.config = copy.deepcopy(settings)
    rebind(model, rounding=outcome.described(calibration.source, calibration.texts))
    if outcome.starved:
        runtime.warn_once(
            f"{outcome.starved} of {outcome.compensated + outcome.starved} matrices got too few tokens of the calibration text "
            "and were rounded without compensation; use a longer text (model.dso.manifest.rounding names them)"
        )


def estimated_seconds(shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, str | None], tokens: int) -> float:
    """A rough estimate of the time that calibration takes on this machine, from the speed of one product."""
    weights = sum(math.prod(shapes[name]) for name, format in formats.items() if format is not None)
    return 2 * weights * tokens * _PASSES / _speed() + weights * _ROUNDING / torch.get_num_threads()


def _speed() -> float:
    """Floating point operations per second of a float32 product."""
    a = torch.ones(768, 768, device="cpu", dtype=torch.float32)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best


def _rounds(checkpoint: Checkpoint, name: str, format: str) -> bool:
    return name not in checkpoint.tensors or checkpoint.lossless_format(name) != format


def _fits(checkpoint: Checkpoint) -> bool:
    """Whether the original model fits in free memory twice: it is loaded as a whole, and rounded layer by layer."""
    return 2 * sum(info.nbytes for info in checkpoint.tensors.values()) <= free_memory().free
