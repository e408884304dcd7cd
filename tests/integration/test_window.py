"""Blocks dropped through the arena: shared ones stay visible to other sequences, and an error changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.cache import SequenceBlocks
from deepseek_optimizer.errors import CacheFullError, UnsupportedRequestError
from deepseek_optimizer.graph.rope_rotation import KeyRotation, Pairs, key_rotation
from deepseek_optimizer.integration.memory.arena import Arena
from deepseek_optimizer.models import build_graph
from support.family_configs import llama
from support.models import random_ids, random_model, weights_of
from support.steps import Part, run_step


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(llama())


def arena_of(model: Any, blocks: int = 16, **options: Any) -> tuple[Arena, SequenceBlocks]:
    """A cache, and a sequence of 150 tokens in it."""
    graph = build_graph(model.config)
    options = {"rotation": key_rotation(graph), **options}
    arena = Arena(ReferenceBackend().new_store(graph, "fp32", blocks), 3, **options)
    sequence = SequenceBlocks(arena.manager)
    plan = ReferenceBackend().compile(graph, weights_of(model))
    run_step(plan, arena.store, [Part(sequence, random_ids(model.config, 150))])
    return arena, sequence


def content(arena: Arena, sequence: SequenceBlocks) -> list[torch.Tensor]:
    layers = [arena.store.read(layer, sequence.table(), sequence.tokens) for layer in range(3)]
    return [t for pair in layers for t in pair]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state(arena: Arena, sequence: SequenceBlocks) -> tuple[Any, ...]:
    return list(sequence.blocks), sequence.tokens, arena.manager.free_blocks, [arena.manager.users(b) for b in range(16)]


def test_sequences_that_share_blocks_are_unaffected(model: Any) -> None:
    arena, first = arena_of(model)
    alone, only = arena_of(model)
    second = first.fork()
    before = content(arena, first)
    arena.drop_blocks(second, 1, 2)
    alone.drop_blocks(only, 1, 2)
    assert same(content(arena, first), before)
    assert same(content(arena, second), content(alone, only))  # copied or not
    assert second.blocks[0] == first.blocks[0] and not set(second.blocks[1:]) & set(first.blocks)
    values = content(arena, second)[1]
    assert torch.equal(values, torch.cat((before[1][:, :32], before[1][:, 96:]), 1))
    first.free()
    second.free()
    assert arena.manager.free_blocks == 16


def test_positions_may_begin_anywhere(model: Any) -> None:
    """Keys are rotated from their position: the first position changes only the rounding of angles."""
    (a, one), (b, two) = arena_of(model), arena_of(model)
    a.drop_blocks(one, 1, 2)
    b.drop_blocks(two, 1, 2, first_position=500)
    x, y = content(a, one)[0], content(b, two)[0]
    assert not torch.equal(x, y) and torch.allclose(x, y, atol=1e-3)


def test_too_few_blocks_for_copies(model: Any) -> None:
    arena, first = arena_of(model, blocks=6)
    second = first.fork()
    before, kept = state(arena, second), content(arena, second)
    with pytest.raises(CacheFullError) as error:
        arena.drop_blocks(second, 1, 2)
    assert (error.value.needed, error.value.free) == (2, 1)
    assert state(arena, second) == before and same(content(arena, second), kept)
    arena.drop_blocks(second, 1, 3)  # one copy, for which there is room


@pytest.mark.parametrize("fails", ["copy_block", "rotate"])
def test_a_store_that_fails(model: Any, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, first = arena_of(model)
    second = first.fork()
    before, kept = state(arena, second), content(arena, second)

    def broken(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(arena.store, fails, broken)
    with pytest.raises(MemoryError):
        arena.drop_blocks(second, 1, 2)
    assert state(arena, second) == before and same(content(arena, second), kept)
    assert not arena._store_lock.locked()
    monkeypatch.undo()
    arena.drop_blocks(second, 1, 2)


def test_keys_that_cannot_move(model: Any) -> None:
    arena, sequence = arena_of(model, rotation=None)
    before = state(arena, sequence)
    with pytest.raises(UnsupportedRequestError, match="without cache_window"):
        arena.drop_blocks(sequence, 1, 1)
    arena.rotation = KeyRotation(np.ones(6, np.float32), Pairs(12, 0, False), context=149)
    with pytest.raises(UnsupportedRequestError, match="at most 149"):
        arena.drop_blocks(sequence, 1, 1)
    assert state(arena, sequence) == before


def test_blocks_that_are_not_full(model: Any) -> None:
    arena, sequence = arena_of(model)
    before = state(arena, sequence)
    for run in ((3, 2), (-1, 1), (5, 1)):
        with pytest.raises(ValueError, match="full blocks"):
            arena.drop_blocks(sequence, *run)
    assert state(arena, sequence) == before
    arena.drop_blocks(sequence, 0, 4)
    assert sequence.tokens == 22 and len(sequence.blocks) == 1
