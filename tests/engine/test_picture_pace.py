"""A step of the engine comes between two pieces of a picture, while anything is running."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

from deepseek_optimizer.engine import picture_pace
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
        self.encoded = False

    def next_piece(self):
        with self._turn:
            seconds = super().next_piece()
            self.log.append("piece")
            self._turn.notify_all()
            return seconds

    def stepped(self, core):
        with self._turn:
            self.log.append("step")
            super().stepped(core)

    def await_piece(self):
        """Waits until a piece has followed the latest step, so that the stream does not end before the picture."""
        with self._turn:
            assert self._turn.wait_for(lambda: self.encoded or self.log[-1:] != ["step"], 30)

    def encode(self, pieces):
        """Asks for pieces as fast as it can. Returns how long each may take."""
        limits = [self.next_piece() for _ in range(pieces)]
        with self._turn:
            self.encoded = True
            self._turn.notify_all()
        return limits


def test_a_step_between_any_two_pieces(monkeypatch):
    """The pieces are asked for by another thread, and a stream runs the whole time."""
    monkeypatch.setattr(picture_pace, "_PATIENCE", 30)

    async def main():
        pace, core = LoggedPace(), make_core(stall=2.5)
        step = core.step
        monkeypatch.setattr(core, "step", lambda: (pace.await_piece(), step())[1])
        engine = AsyncEngine(core, "mock", picture_encoder=SimpleNamespace(pace=pace))
        await engine.start()
        with engine.admit():
            encoding = None
            async for _ in engine.submit(Request([1, 2], LONG)):
                encoding = encoding or asyncio.create_task(asyncio.to_thread(pace.encode, 50))
        limits = await encoding
        assert pace.log.count("piece") == 50 and ("piece", "piece") not in set(zip(pace.log, pace.log[1:], strict=False))
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
