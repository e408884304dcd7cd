"""What a step of the engine computes, how long it took, and what else a replay shows of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..backends.base import DECODE
from ..engine.sequence import Part
from .settings import Figures, Settings
from .traces import Trace


@dataclass(frozen=True)
class StepLoad:
    """What a step computes.

    Attributes:
        rows: tokens that are decoded, drafts included.
        drafts: those of them that are drafts.
        prompt: tokens of prompts.
        attended: tokens before the step that decoded ones attend to, in sum.
        prompt_attended: tokens that those of prompts attend to, in sum.
    """

    rows: int = 0
    drafts: int = 0
    prompt: int = 0
    attended: int = 0
    prompt_attended: int = 0


def load_of(parts: Sequence[Part]) -> StepLoad:
    """What a step with these parts computes."""
    rows = drafts = prompt = attended = prompt_attended = 0
    for part in parts:
        count = len(part.ids)
        before = count * part.start
        if part.phase == DECODE:
            rows, drafts, attended = rows + count, drafts + count - 1, attended + before
        else:
            prompt, prompt_attended = prompt + count, prompt_attended + before + count * (count + 1) // 2
    return StepLoad(rows, drafts, prompt, attended, prompt_attended)


@dataclass(frozen=True)
class TimedStep:
    """A step, and the seconds that it took, with scheduling, drafting and choosing tokens."""

    load: StepLoad
    seconds: float


@dataclass
class Record:
    """What a replay shows besides its figures.

    Attributes:
        steps: in order, without those that computed nothing.
        answers: the tokens of each request's answer.
        drafted: number of rounds with drafts, of drafts in them, and of drafts that were accepted.
    """

    steps: list[TimedStep] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    drafted: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Observation:
    """A replay with some settings, for a cost model.

    Attributes:
        settings, figures, record: what was replayed, and what it showed.
        trace, prompts: as they were sent.
        context: the model's, in tokens.
        chunk: see `ModelFacts`.
        blocks: of the cache.
        weight_bytes: memory of the weights, which is part of `figures.memory_bytes`.
        layers_draft: whether layers of the model draft tokens, or another model, besides prompt lookup.
    """

    settings: Settings
    figures: Figures
    record: Record
    trace: Trace
    prompts: list[list[int]]
    context: int
    chunk: int | None
    blocks: int
    weight_bytes: float
    layers_draft: bool = False
