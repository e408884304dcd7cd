"""Functions in threads that are waited for, also by a task that is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from deepseek_optimizer.server.batches.in_thread import in_thread


def test_results_and_errors():
    async def run():
        assert await in_thread(lambda a, b: a + b, 1, b=2) == 3
        with pytest.raises(OSError, match="full"):
            await in_thread(_fail)

    asyncio.run(run())


def _fail():
    raise OSError("full")


@pytest.mark.parametrize("error", [False, True])
def test_a_cancelled_task_ends_after_its_thread(error):
    release, ended = threading.Event(), threading.Event()

    def work():
        release.wait(10)
        ended.set()
        if error:
            _fail()

    async def run():
        task = asyncio.create_task(in_thread(work))
        for _ in range(3):  # however often
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
        release.set()
        await asyncio.wait({task})
        assert ended.is_set() and task.cancelled()

    asyncio.run(run())
