"""A window of the cache: blocks dropped from the middle and later keys rotated back, against an oracle that caches keys before
RoPE; on the reference and on every native ISA."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import native
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.cache import SequenceBlocks
from deepseek_optimizer.cache.cache_window import CacheWindow
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.rope_rotation import key_rotation
from deepseek_optimizer.integration.memory.arena import Arena
from deepseek_optimizer.models import build_graph
from support.late_rope import LateRope
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, run_step

from .cpu.packing import packed_weights

MODELS = [
    "llama-gqa", "llama-yarn", "llama-llama3", "llama-dynamic", "qwen2-windows", "qwen3-gqa", "deepseek_v2-greedy",
    "deepseek_v2-groups", "deepseek_v3-groups", "deepseek_v3-halves", "deepseek_v32-indexer", "youtu-direct",
]  # fmt: skip
POLICY = CacheWindow(tokens=192, sinks=1, share=0.25)
READ, CHUNK, PINNED = 640, 45, ((70, 75),)


def backends() -> list[Any]:
    names = [] if cpu.unavailable_reason() else [n for n in native.isa_names() if native.isa_runs_here(n)]
    return ["reference", *names]


def made(name: str) -> Any:
    return ReferenceBackend() if name == "reference" else cpu.CpuBackend(isa=cpu.exact(name), threads=2)


def chunks() -> list[tuple[int, int]]:
    """Chunks of the text, alternating between a large one and single tokens."""
    result, begin = [], 0
    while begin < READ:
        for size in (CHUNK, 1, 1):
            result.append((begin, min(begin + size, READ)))
            begin += size
    return [(a, b) for a, b in result if a < b]


@cache
def oracle(name: str) -> tuple[Any, list[int], torch.Tensor]:
    """A model, a text, and its expected logits with the window."""
    model = random_model(CASES[name]())
    ids, late, pinned, logits = random_ids(model.config, READ), LateRope(model), PINNED, []
    for begin, end in chunks():
        for drop in POLICY.drops(late.cache.get_seq_length(), pinned, end - begin):
            late.drop(32 * drop.first_block, 32 * (drop.first_block + drop.count))
            pinned = drop.renumbered(pinned)
        logits.append(late.read(ids[begin:end]))
    return model, ids, torch.cat(logits)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_window(name: str, backend: str) -> None:
    model, ids, expected = oracle(name)
    graph, _ = rules.apply(build_graph(model.config))
    serving = made(backend)
    weights = weights_of(model) if backend == "reference" else packed_weights(weights_of(model), "fp32")
    plan, arena = serving.compile(graph, weights), Arena(serving.new_store(graph, "fp32", 8), 3, rotation=key_rotation(graph))
    sequence, pinned, logits, max_blocks, dropped = SequenceBlocks(arena.manager), PINNED, [], 0, 0
    for begin, end in chunks():
        for drop in POLICY.drops(sequence.tokens, pinned, end - begin):
            arena.drop_blocks(sequence, drop.first_block, drop.count)
            pinned, dropped = drop.renumbered(pinned), dropped + 32 * drop.count
        phase = DECODE if end - begin == 1 else PREFILL
        logits.append(run_step(plan, arena.store, [Part(sequence, ids[begin:end], phase)]).logits)
        max_blocks = max(max_blocks, len(sequence.blocks))
    assert_close_rows(torch.cat(logits), expected)
    assert 32 * max_blocks <= POLICY.tokens  # memory does not grow
    assert sequence.tokens + dropped == READ and dropped >= 2 * POLICY.tokens
    assert pinned == ((38, 43),)  # the block between it and the sinks was dropped
