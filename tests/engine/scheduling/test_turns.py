"""Fairness between clients: a client with many requests delays only itself, and no text changes."""

from __future__ import annotations

import pytest

from deepseek_optimizer.engine.request import Request, SamplingParams
from support.mock_model import blocks_in_use, expected, make_core


def asked(name: str, client: str, tokens: int = 20, prompt: int = 3, priority: int = 0) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    tokens_of_name = [ord(c) % 50 for c in name]  # prompts of different names differ in every block
    return Request((tokens_of_name * prompt)[:prompt], sampling, id=name, client=client, priority=priority)


class Watched:
    """A core, with the outputs of each request and the order in which they ended."""

    def __init__(self, **options):
        self.core = make_core(**options)
        self.requests, self.texts, self.ended = {}, {}, []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.core.add(request)
            self.requests[request.id], self.texts[request.id] = request, []

    def step(self) -> None:
        for output in self.core.step():
            self.texts[output.request_id] += output.token_ids
            if output.finish:
                self.ended.append(output.request_id)

    def to_the_end(self) -> list[str]:
        """Runs all requests and checks their texts; returns the order in which they ended."""
        for _ in range(20_000):
            if self.core.idle:
                break
            self.step()
        assert sorted(self.ended) == sorted(self.requests)
        for name, request in self.requests.items():
            assert self.texts[name] == expected(request.prompt, request.sampling.max_tokens, None)
        assert blocks_in_use(self.core) == 0
        return self.ended

    @property
    def running(self) -> list[str]:
        return [r.request.client for r in self.core.scheduler.running]


def test_waiting_clients_get_turns_despite_long_queues_of_others():
    watched = Watched(batch_size_range=(1, 1))
    watched.add(*(asked(f"a{n}", "a") for n in range(10)), *(asked(f"b{n}", "b") for n in range(3)))
    order = watched.to_the_end()
    assert order[:6] == ["a0", "b0", "a1", "b1", "a2", "b2"] or order[:6] == ["a0", "a1", "b0", "a2", "b1", "b2"]
    assert [name for name in order if name[0] == "a"] == [f"a{n}" for n in range(10)]


def test_a_single_client_is_served_in_order():
    watched = Watched(batch_size_range=(1, 1))
    watched.add(*(asked(str(n), "a", priority=p) for n, p in enumerate([1, 0, 1, 0])))
    assert watched.to_the_end() == ["1", "3", "0", "2"]
    assert watched.core.scheduler.preemptions == 0


def test_a_full_batch_preempts_for_a_client_without_a_slot():
    watched = Watched(batch_size_range=(4, 4))
    watched.add(*(asked(f"a{n}", "a", tokens=300) for n in range(8)))
    for _ in range(10):
        watched.step()
    assert watched.running == ["a"] * 4
    watched.add(asked("b0", "b"), asked("b1", "b"))
    watched.step()
    assert sorted(watched.running) == ["a", "a", "a", "b"]  # one slot: its second request waits
    order = watched.to_the_end()
    assert order[:2] == ["b0", "b1"]


def test_a_client_keeps_its_only_slot():
    watched = Watched(batch_size_range=(2, 2))
    watched.add(asked("a", "a", tokens=50), asked("b", "b", tokens=50))
    watched.step()
    watched.add(asked("c", "c"))
    watched.step()
    assert watched.running == ["a", "b"]
    watched.to_the_end()
    assert watched.core.scheduler.preemptions == 0


def test_higher_priorities_are_not_preempted_by_lower_ones():
    watched = Watched(batch_size_range=(2, 2))
    watched.add(asked("a0", "a", tokens=50), asked("a1", "a", tokens=50))
    watched.step()
    watched.add(asked("b", "b", priority=1))
    watched.step()
    assert watched.running == ["a", "a"]
    watched.to_the_end()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_blocks_are_shared_fairly_too(prefix_cache):
    """Client a's requests hold all blocks of the cache for long: b's small request preempts the latest of them."""
    watched = Watched(blocks=12, batch_size_range=(8, 8), prefix_cache=prefix_cache)
    watched.add(*(asked(f"a{n}", "a", tokens=100, prompt=90) for n in range(6)))
    for _ in range(5):
        watched.step()
    assert len(watched.running) > 1
    watched.add(asked("b", "b", tokens=10, prompt=40))
    assert watched.to_the_end()[0] == "b"


def test_the_client_with_the_most_blocks_is_preempted_first():
    """b's single request came last and keeps its blocks while a's five grow beyond the cache."""
    watched = Watched(blocks=14, batch_size_range=(8, 8), prefix_cache=False)
    watched.add(*(asked(f"a{n}", "a", tokens=200) for n in range(5)), asked("b", "b", tokens=120))
    watched.step()
    [own] = [one for one in watched.core.scheduler.running if one.request.client == "b"]
    while "b" not in watched.ended:
        watched.step()
    assert watched.core.scheduler.preemptions > 0 and own.preempted == 0
    watched.to_the_end()


def test_prefill_alternates_between_clients():
    """a's four long prompts came before b's, which is processed directly after the first of them."""
    watched = Watched(step_tokens=64, blocks=600, batch_size_range=(8, 8))
    watched.add(*(asked(f"a{n}", "a", tokens=1, prompt=1500 + n) for n in range(4)), asked("b", "b", tokens=1, prompt=2000))
    assert watched.to_the_end().index("b") <= 2
