"""Runs requests on an engine over the mock model (mock_model.py): texts to ask with, and all answers."""

from __future__ import annotations

import random
from collections.abc import Callable

from deepseek_optimizer.engine.core import EngineCore
from deepseek_optimizer.engine.engine import Completion
from deepseek_optimizer.engine.request import Request, SamplingParams
from support.mock_model import VOCAB, blocks_in_use

MAX_STEPS = 50_000


def text(seed: int, count: int) -> list[int]:
    """Random token ids without the end of the text."""
    rng = random.Random(seed)
    return [rng.randrange(VOCAB - 1) for _ in range(count)]


def endless(max_tokens: int) -> SamplingParams:
    """Greedy sampling of exactly `max_tokens` tokens."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def run(core: EngineCore, *requests: Request, after_step: Callable[[], object] = lambda: None) -> dict[str, Completion]:
    """All answers by id. Fails if the engine does not become idle, or then still uses blocks."""
    answers = {r.id: Completion() for r in requests}
    for request in requests:
        core.add(request)
    for _ in range(MAX_STEPS):
        for output in core.step():
            assert answers[output.request_id].finish is None
            answers[output.request_id].add(output)
        after_step()
        if core.idle:
            assert blocks_in_use(core) == 0
            return answers
    raise AssertionError("the engine does not become idle")


def run_and_count(core: EngineCore, *requests: Request) -> tuple[dict[str, Completion], int]:
    """All answers by id, and the maximum number of blocks in use after a step."""
    counts: list[int] = []
    answers = run(core, *requests, after_step=lambda: counts.append(blocks_in_use(core)))
    return answers, max(counts)
