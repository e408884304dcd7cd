"""A step of the engine comes between two pieces of a picture, while anything is running."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

from deepseek_optimizer.engine.async_engine import AsyncEngine
from deepseek_optimizer.engine.picture_pace import PicturePace
from deepseek_optimizer.engine.request import Request, SamplingParams
from support.mock_model import make_core

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def test_without_an_engine_nothing_waits():
    pace = PicturePace()
    assert [pace.next_piece() for _ in range(3)] == [math.inf] * 3


class LoggedPace(PicturePace):
    """Records the order of steps and pieces."""

    def __init__(self):
        super().__init__()
        self.log = []

    def next_piece(self):
        with self._turn:
            seconds = super().next_piece()
            self.log.append("piece")
            return seconds

    def stepped(self, core):
        with self._turn:
            self.log.append("step")
            super().stepped(core)


def test_a_step_between_any_two_pieces():
    """The pieces are asked for by another thread, as fast as it can; a stream runs the whole time."""

    async def main():
        pace = LoggedPace()
        engine = AsyncEngine(make_core(stall=2.5), "mock", picture_encoder=SimpleNamespace(pace=pace))
        await engine.start()
        limits = []

        def encode():
            pace.log.clear()
            limits.extend(pace.next_piece() for _ in range(50))

        with engine.admit():
            encoding = None
            async for output in engine.submit(Request([1, 2], LONG)):
                if encoding is None:
                    encoding = asyncio.create_task(asyncio.to_thread(encode))
                if encoding.done():
                    assert output.finish is None  # the stream was running all the time
                    break
        await encoding
        log = pace.log[: len(pace.log) - pace.log[::-1].index("piece")]
        assert log.count("piece") == 50 and ("piece", "piece") not in set(zip(log, log[1:], strict=False))
        assert 0 < max(limits[5:]) < math.inf
        await engine.close()
        assert pace.next_piece() == math.inf  # no engine, no steps to wait for

    asyncio.run(asyncio.wait_for(main(), 60))


def test_pieces_are_as_long_as_prompts_may_delay_a_step():
    core = make_core(stall=2.5)
    for _ in range(20):
        core.times.add(0.04, 1, 0)
    assert core.scheduler.budget.spare(1) == 1.5 * core.times.decode(1)
    assert core.scheduler.budget.spare(0) is None and make_core().scheduler.budget.spare(1) is None
