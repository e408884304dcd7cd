"""How many answers of a batch are computed at once."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest

from deepseek_optimizer.batch.places import Places, answers_of
from deepseek_optimizer.batch.requests import read_requests
from deepseek_optimizer.batch.results import Results
from deepseek_optimizer.batch.run import answer_all


@pytest.mark.parametrize(
    ("url", "body", "count"),
    [
        ("/v1/chat/completions", {"messages": []}, 1),
        ("/v1/chat/completions", {"messages": [], "n": 5}, 5),
        ("/v1/completions", {"prompt": "a", "n": 2, "best_of": 7}, 7),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, 6),
        ("/v1/completions", {"prompt": [5, 6, 7], "n": 2}, 2),  # one text, as tokens
        ("/v1/completions", {"prompt": [[5, 6], [7]]}, 2),
        ("/v1/completions", {"prompt": [], "n": "many"}, 1),
        ("/v1/completions", {"prompt": None, "n": True}, 1),
        ("/v1/completions", {"prompt": "a", "n": -3}, 1),
        ("/v1/embeddings", {"input": ["a", "b"]}, 2),
        ("/v1/embeddings", {"input": "a"}, 1),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 2, "n": 5}, 1),
    ],
)
def test_answers_of_a_request(url, body, count):
    assert answers_of(url, body) == count


def test_never_more_than_there_are_and_in_order():
    """Random requests, some of which are cancelled while they wait or have places: nothing is lost, nobody is overtaken."""

    async def run():
        places, rng, used, highest, order = Places(8), random.Random(5), 0, 0, []

        async def take(number, wanted, seconds):
            nonlocal used, highest
            async with places.taken(wanted):
                order.append(number)
                used += min(wanted, 8)
                highest = max(highest, used)
                try:
                    await asyncio.sleep(seconds)
                finally:
                    used -= min(wanted, 8)

        tasks = [asyncio.create_task(take(n, rng.randint(1, 12), rng.random() / 1000)) for n in range(200)]
        while not all(task.done() for task in tasks):
            rng.choice(tasks[:100]).cancel()
            await asyncio.sleep(0.0005)
        assert all(not task.cancelled() and task.exception() is None for task in tasks[100:])
        return places, used, highest, order

    places, used, highest, order = asyncio.run(run())
    assert highest == 8 and used == 0
    assert order == sorted(order) and set(order) >= set(range(100, 200))
    assert places._free == 8 and not places._waiting


def test_a_cancelled_request_does_not_hold_back_those_behind_it():
    async def run():
        places = Places(2)
        async with places.taken(1):
            large = asyncio.create_task(_once(places, 2))
            small = asyncio.create_task(_once(places, 1))
            await asyncio.sleep(0.01)
            assert not small.done()
            large.cancel()
            await asyncio.wait_for(small, 5)

    asyncio.run(run())


async def _once(places, wanted):
    async with places.taken(wanted):
        pass


def test_a_request_with_several_answers_counts_as_so_many(tmp_path):
    """Requests of 1 to 9 answers, of which 4 are computed at once; one with more runs alone."""
    counts = [1, 3, 9, 2, 2, 1, 1, 1, 1, 4, 1, 3]
    source = tmp_path / "in"
    lines = [
        {"custom_id": str(i), "url": "/v1/completions", "body": {"prompt": "a", "n": n, "seed": 1}}
        for i, n in enumerate(counts)
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    running: list[int] = []
    seen: list[tuple[int, ...]] = []

    async def respond(request):
        n = json.loads(request.content)["n"]
        running.append(n)
        seen.append(tuple(running))
        await asyncio.sleep(0.005)
        running.remove(n)
        return httpx.Response(200, json={})

    async def run():
        job = read_requests(source)
        with Results(tmp_path / "out", {}, len(counts)) as results:
            async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://localhost") as client:
                await answer_all(client, job, results, Places(4))
            return len(results.done)

    assert asyncio.run(run()) == len(counts)
    assert all(sum(one) <= 4 or one == (9,) for one in seen)
    assert max(map(sum, seen)) == 9 and max(map(len, seen)) > 1
