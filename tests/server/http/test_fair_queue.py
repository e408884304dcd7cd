"""Fair queueing by key: nobody waits for another key's whole queue, each job runs at most once, and limits are kept."""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import time
from collections import Counter

import pytest

from deepseek_optimizer.server.http.caller import client_of
from deepseek_optimizer.server.http.fair_queue import FairQueue
from deepseek_optimizer.server.http.problems import ApiError


def queue(
    places: int = 1, max_running: int = 1, max_per_client: int = 100, max_jobs: int = 1000, share: float = 1.0
) -> FairQueue:
    return FairQueue("work", places, max_running=max_running, max_per_client=max_per_client, max_jobs=max_jobs, share=share)


def later(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


async def until(condition) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("the condition was not met in time")


class Jobs:
    """Jobs that end on command; records which have started."""

    def __init__(self):
        self.begun, self.go = [], threading.Event()

    def __call__(self, name):
        def work():
            self.begun.append(name)
            assert self.go.wait(30)
            return name

        return work


def run(test):
    """Runs a coroutine function as a test; its queue must be empty afterwards."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        async def main():
            result = await test(*args, **kwargs)
            if result is not None:
                await until(lambda: result.waiting == result.running == 0)
                assert not result._held and not result._running and not result._waiting
                result.close()

        asyncio.run(asyncio.wait_for(main(), 60))

    return wrapped


@run
async def test_keys_take_turns_regardless_of_their_load():
    work, jobs = queue(), Jobs()
    requested = [("a", n) for n in range(20)] + [("b", n) for n in range(3)] + [("c", 0)]
    tasks = []
    for key, n in requested:
        tasks.append(asyncio.ensure_future(work.run(key, jobs((key, n)), later())))
        await asyncio.sleep(0)
    await until(lambda: jobs.begun == [("a", 0)])
    jobs.go.set()
    assert await asyncio.gather(*tasks) == requested
    assert jobs.begun[:7] == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("a", 2), ("b", 1), ("a", 3)]
    assert work.counts.jobs == Counter(done=len(requested))
    return work


@run
async def test_a_key_leaves_a_slot_to_the_others():
    work, jobs = queue(places=2), Jobs()
    own = [asyncio.ensure_future(work.run("a", jobs(n), later())) for n in range(3)]
    await until(lambda: jobs.begun)
    await asyncio.sleep(0.02)
    assert jobs.begun == [0] and (work.running, work.waiting) == (1, 2)
    assert await work.run("b", lambda: "done at once", later()) == "done at once"
    jobs.go.set()
    assert await asyncio.gather(*own) == [0, 1, 2]
    return work


@run
async def test_a_key_over_its_limit_is_rejected_and_others_are_not():
    work, jobs = queue(max_per_client=3, max_jobs=4), Jobs()
    own = [asyncio.ensure_future(work.run("a", jobs(n), later())) for n in range(3)]
    await until(lambda: jobs.begun)
    with pytest.raises(ApiError, match="3 of your requests") as refused:
        await work.run("a", jobs("refused"), later())
    assert refused.value.status == 429 and refused.value.headers["Retry-After"]
    own.append(asyncio.ensure_future(work.run("b", jobs("b"), later())))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as full:
        await work.run("c", jobs("refused"), later())
    assert full.value.status == 503
    jobs.go.set()
    await asyncio.gather(*own)
    assert "refused" not in jobs.begun and work.counts.jobs == Counter(done=4, refused=2)
    return work


@run
async def test_jobs_cancelled_while_waiting_never_start():
    work, jobs = queue(), Jobs()
    first, second, third = (asyncio.ensure_future(work.run("a", jobs(n), later())) for n in range(3))
    await until(lambda: jobs.begun)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    jobs.go.set()
    assert await asyncio.gather(first, third) == [0, 2]
    assert jobs.begun == [0, 2] and work.counts.jobs == Counter(done=2, left=1)
    return work


@run
async def test_jobs_cancelled_while_running_hold_their_slot():
    work, jobs = queue(), Jobs()
    first = asyncio.ensure_future(work.run("a", jobs("first"), later()))
    await until(lambda: jobs.begun)
    second = asyncio.ensure_future(work.run("b", jobs("second"), later()))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.sleep(0.02)
    assert jobs.begun == ["first"] and work.running == 1
    jobs.go.set()
    assert await second == "second"
    return work


@run
async def test_deadlines_end_waiting_and_running_jobs():
    work, jobs = queue(), Jobs()
    with pytest.raises(ApiError) as late:
        await work.run("a", jobs("slow"), later(0.02))
    assert late.value.status == 504 and jobs.begun == ["slow"]
    with pytest.raises(ApiError):
        await work.run("b", jobs("never"), later(0.02))
    jobs.go.set()
    await until(lambda: work.running == 0)
    assert jobs.begun == ["slow"] and work.counts.jobs == Counter(done=1, late=1)
    return work


@run
async def test_errors_of_a_job_reach_the_caller():
    work = queue()

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await work.run("a", fail, later())
    return work


@pytest.mark.parametrize("seed", range(4))
@run
async def test_at_random_each_job_runs_once_or_never(seed):
    """Clients arrive and leave at random; nobody starves, and the limits always hold."""
    rng = random.Random(seed)
    work, ran, lock = queue(places=3, max_running=2), Counter(), threading.Lock()
    running = Counter()

    def job(key, n):
        def do():
            with lock:
                running[key] += 1
                assert running[key] <= 2 and running.total() <= 3
            time.sleep(rng.random() * 0.002)
            with lock:
                running[key] -= 1
                ran[key, n] += 1
            return n

        return do

    async def client(key, n):
        task = asyncio.ensure_future(work.run(key, job(key, n), later()))
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
        try:
            assert await task == n
        except asyncio.CancelledError:
            return 0
        return 1

    answered = await asyncio.gather(*(client(rng.choice("aaaabc"), n) for n in range(60)))
    await until(lambda: work.running == 0)
    assert set(ran.values()) == {1} and sum(answered) <= ran.total() == work.counts.jobs["done"] >= 30
    assert work.counts.jobs.total() == 60
    return work


@run
async def test_closing_ends_waiting_jobs():
    work, jobs = queue(), Jobs()
    tasks = [asyncio.ensure_future(work.run("a", jobs(n), later())) for n in range(3)]
    await until(lambda: jobs.begun)
    work.close()
    jobs.go.set()
    actual = await asyncio.gather(*tasks, return_exceptions=True)
    assert actual[0] == 0 and all(isinstance(one, asyncio.CancelledError) for one in actual[1:])


def test_how_clients_are_distinguished():
    assert client_of("hash", ("10.0.0.1", 1)) == client_of("hash", ("10.0.0.2", 2)) != client_of("other", ("10.0.0.1", 1))
    assert client_of("", ("10.0.0.1", 1)) == client_of("", ("10.0.0.1", 2)) == client_of("", ("::ffff:10.0.0.1", 3))
    assert client_of("", ("10.0.0.1", 1)) != client_of("", ("10.0.0.2", 1))
    assert client_of("", ("2001:db8::1", 1)) == client_of("", ("2001:db8::2", 1)) != client_of("", ("2001:db8:0:1::1", 1))
    assert client_of("", ("fe80::1%eth0", 1)) == client_of("", ("fe80::1", 1))
    assert client_of("", None) and client_of("", ("", 0))


@run
async def test_time_shares_are_enforced_by_pauses():
    work, begun = queue(share=0.1), []

    def job(name, seconds=0.0):
        def run_it():
            begun.append((name, time.monotonic()))
            time.sleep(seconds)

        return run_it

    jobs = [("a", job("a0", 0.05)), ("a", job("a1")), ("b", job("b0"))]
    await asyncio.gather(*(work.run(key, made, later()) for key, made in jobs))
    assert [name for name, _ in begun] == ["a0", "b0", "a1"]
    assert begun[2][1] - begun[0][1] >= 0.05 / 0.1 - 0.01
    return work
