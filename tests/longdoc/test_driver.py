"""Strategies over an engine whose model is a function: prompts arrive, replies are matched, and everything ends cleanly."""

from __future__ import annotations

import pytest

from deepseek_optimizer.chat.conversation import StopSignal
from deepseek_optimizer.engine.engine import Engine
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.errors import BackendError, RequestError
from deepseek_optimizer.longdoc.driver import Driver, TokenUsage
from deepseek_optimizer.longdoc.strategy_protocol import Ask, Batch, Result
from support.mock_model import blocks_in_use, expected, make_core

GREEDY = SamplingParams(temperature=0.0)
PROMPTS = [[n, *range(40)] for n in range(1, 6)]


def driver(**options) -> tuple[Driver, Engine]:
    engine = Engine(make_core(**options))
    return Driver(lambda window: engine, lambda schema: None, GREEDY), engine


def asking(*batches: Batch, seen: list | None = None):
    for batch in batches:
        replies = yield batch
        if seen is not None:
            seen.append(replies)
    return Result("done", [], "whole")


def text_of(tokens: list[int]) -> str:
    return "".join(chr(65 + t) for t in tokens if t != 60)


def test_replies_come_from_the_model_and_tokens_are_counted():
    made, engine = driver()
    seen: list = []
    batches = [Batch([Ask(p, 9) for p in PROMPTS], left=45), Batch([Ask(PROMPTS[0] + [7], 3)])]
    result, tokens = made.run(asking(*batches, seen=seen))
    assert result.answer == "done"
    assert [reply.text for reply in seen[0]] == [text_of(expected(p, 9)) for p in PROMPTS]
    assert seen[1][0].cached == 32 and seen[1][0].read == 42
    assert tokens == TokenUsage(
        read=sum(map(len, PROMPTS)) + 42, cached=32, generated=sum(r.generated for replies in seen for r in replies)
    )
    assert all(reply.complete == (expected(p, 9)[-1] == 60) for p, reply in zip(PROMPTS, seen[0], strict=True))
    assert blocks_in_use(engine.core) == 0


def test_progress_grows_to_the_total():
    made, _ = driver(step_tokens=16)
    calls: list[tuple[int, int]] = []
    made.run(
        asking(Batch([Ask(p, 2) for p in PROMPTS], left=41), Batch([Ask(PROMPTS[2] + [3], 2)])),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert all(a[0] <= b[0] for a, b in zip(calls, calls[1:], strict=False)) and len({done for done, _ in calls}) > 10
    assert calls[0][1] == 246 and calls[-1] == (247, 247)


def test_stopping_ends_between_steps_without_leaks():
    made, engine = driver(step_tokens=16)
    stop, closed = StopSignal(), []

    def work():
        try:
            yield Batch([Ask(p, 50) for p in PROMPTS])
        finally:
            closed.append(True)

    def progress(done, _total):
        if done > 60:
            stop.ask()

    with pytest.raises(KeyboardInterrupt):
        made.run(work(), progress, stop)
    assert closed and engine.core.idle and blocks_in_use(engine.core) == 0
    assert made.run(asking(Batch([Ask(PROMPTS[0], 4)])))[0].answer == "done"


def test_impossible_prompts_run_nothing():
    made, engine = driver(blocks=4)
    with pytest.raises(RequestError, match="do not fit"):
        made.run(asking(Batch([Ask(PROMPTS[0], 4), Ask(list(range(50)) * 4, 4)])))
    assert engine.core.idle and engine.core.metrics.prompt_tokens == 0


def test_a_model_that_fails_is_an_error():
    made, engine = driver()
    engine.core.runner.broken.add(PROMPTS[1][-1])
    with pytest.raises(BackendError):
        made.run(asking(Batch([Ask(PROMPTS[1], 4)])))
    assert engine.core.idle


def test_repetitive_replies_are_ended(monkeypatch):
    from support import mock_model

    monkeypatch.setattr(mock_model, "next_token", lambda context: len(context) % 5)
    made, engine = driver()
    seen: list = []
    _, tokens = made.run(asking(Batch([Ask([1, 2, 3], 900)]), seen=seen))
    [[reply]] = seen
    assert reply.repeated and not reply.complete and len(reply.text) < 10 and 120 <= tokens.generated < 200
    assert engine.core.idle and blocks_in_use(engine.core) == 0
