"""Which blocks a window drops, against its specification, and its size."""

from __future__ import annotations

import ast
import inspect
import random
from pathlib import Path

import pytest

from deepseek_optimizer.cache import cache_window
from deepseek_optimizer.cache.cache_window import CacheWindow, Drop
from deepseek_optimizer.errors import ConfigError, RequestError


def test_nothing_is_dropped_while_everything_fits() -> None:
    policy = CacheWindow(tokens=1024)
    assert policy.drops(0, coming=700) == policy.drops(1023) == policy.drops(1000, ((0, 1000),), coming=24) == []


def test_the_oldest_share_after_the_sinks_is_dropped() -> None:
    policy = CacheWindow(tokens=1024, sinks=4, share=0.25)
    assert policy.drops(1024) == [Drop(1, 8)]
    assert policy.drops(1000, coming=25) == [Drop(1, 8)]
    assert policy.drops(1024, coming=300) == [Drop(1, 10)]  # more if more is needed
    assert CacheWindow(tokens=1024, sinks=33).drops(1024) == [Drop(2, 8)]
    assert CacheWindow(tokens=1024, sinks=0).drops(1024) == [Drop(0, 8)]


def test_pinned_blocks_stay_and_the_last_run_is_dropped_first() -> None:
    policy = CacheWindow(tokens=1024)
    pinned = ((40, 41), (95, 97), (500, 520))
    assert policy.drops(1024, pinned) == [Drop(4, 8)]  # blocks 1, 2 and 3 are pinned
    assert policy.drops(1024, ((70, 80),)) == [Drop(3, 7), Drop(1, 1)]
    assert policy.drops(1024, ((0, 300),)) == [Drop(10, 8)]


def test_the_recent_part_stays() -> None:
    policy = CacheWindow(tokens=1024, recent=0.5)
    assert policy.drops(1024, ((32, 480),), coming=32) == [Drop(15, 1)]  # only half of a share is available
    with pytest.raises(RequestError, match="pin fewer"):
        policy.drops(1024, ((32, 480),), coming=33)


def test_renumbered() -> None:
    spans = ((3, 20), (70, 80), (200, 230), (300, 400))
    assert Drop(3, 3).renumbered(spans) == ((3, 20), (70, 80), (104, 134), (204, 304))
    assert Drop(20, 3).renumbered(spans) == spans


@pytest.mark.parametrize("seed", range(60))
def test_an_endless_conversation(seed: int) -> None:
    """Random windows, spans and steps with distinct tokens: the window is never exceeded, sinks, pinned and recent tokens stay,
    and settings that `check` accepts never fail."""
    rng = random.Random(seed)
    policy = CacheWindow(
        tokens=rng.randrange(300, 2000),
        sinks=rng.choice((0, 1, 4, 40)),
        share=rng.choice((0.05, 0.25, 0.5)),
        recent=rng.choice((0, 0.1, 0.4)),
    )
    pinned: tuple[tuple[int, int], ...] = ()
    prompt = rng.randrange(1, 3 * policy.tokens)
    for _ in range(rng.randrange(4)):
        begin = rng.randrange(prompt)
        more = (*pinned, (begin, begin + rng.randrange(1, 60)))
        if policy.room(more) >= 8:
            pinned = more
    room = policy.room(pinned)
    policy.check(pinned, room)
    with pytest.raises(RequestError, match="pinned: .*larger window"):
        policy.check(pinned, room + 1)
    names = [t for begin, end in pinned for t in range(begin, end)]
    cached: list[int] = []
    read, drops = 0, 0
    while read < 12 * policy.tokens:
        coming = rng.choice((1, 1, room, rng.randint(1, room)))
        recent = cached[len(cached) - policy.recent_tokens :] if policy.recent_tokens else []
        runs = policy.drops(len(cached), pinned, coming)
        assert [r.first_block for r in runs] == sorted((r.first_block for r in runs), reverse=True)
        for run in runs:
            assert run.count > 0 and run.begin + run.tokens <= len(cached)
            del cached[run.begin : run.begin + run.tokens]
            pinned = run.renumbered(pinned)
            drops += 1
        assert not recent or cached[-len(recent) :] == recent
        cached += range(read, read + coming)
        read += coming
        assert len(cached) <= policy.tokens and policy.room(pinned) == room
        assert cached[: policy.sinks] == list(range(min(policy.sinks, read)))
        assert [t for b, e in pinned for t in cached[b:e]] == [t for t in names if t < read]
    assert drops


def test_drops_are_rare() -> None:
    """A new token is moved only a few times before it is the oldest, for any window."""
    for size in (256, 1024, 8192):
        policy, cached, moves = CacheWindow(tokens=size), 0, 0
        for _ in range(5 * size):
            moves += len(policy.drops(cached))
            cached += 1 - sum(run.tokens for run in policy.drops(cached))
        assert 15 <= moves <= 17


@pytest.mark.parametrize(
    "fields", [{"tokens": 127}, {"tokens": 1024, "sinks": -1}, {"tokens": 1024, "share": 0}, {"tokens": 1024, "share": 0.6},
               {"tokens": 1024, "recent": 0.6}, {"tokens": 1024, "recent": -0.1}, {"tokens": 1024, "sinks": 705}]
)  # fmt: skip
def test_invalid_policies(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="window"):
        CacheWindow(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("span", [(-1, 4), (5, 5), (9, 3)])
def test_invalid_spans(span: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="pinned: each span"):
        CacheWindow(tokens=1024).check((span,))


def test_chunks_larger_than_any_window_are_errors() -> None:
    with pytest.raises(ValueError, match="2000 tokens at once"):
        CacheWindow(tokens=1024).drops(900, coming=2000)


def test_torch_is_not_imported() -> None:
    source = Path(inspect.getfile(cache_window)).read_text()
    imported = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(ast.parse(source))
                if isinstance(n, (ast.Import, ast.ImportFrom))}  # fmt: skip
    assert imported <= {"__future__", "collections.abc", "dataclasses", "errors", "block_manager"}
