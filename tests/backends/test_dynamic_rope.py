"""Frequencies of dynamic RoPE depend on the sequence's own length: each row equals Transformers' result for a text of that
length, for any chunks and any other sequences in the batch."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from support.family_configs import deepseek_v3, deepseek_v32, llama, rope
from support.models import assert_close_rows as close
from support.models import random_ids, random_model, transformers_logits, weights_of
from support.steps import Part, Runner, run_step, runner

from .cpu.packing import packed_weights

DYNAMIC: dict[str, Any] = {"max_position_embeddings": 64, **rope("dynamic", factor=4.0)}
CONFIGS = {
    "llama": lambda: llama(**DYNAMIC),
    "deepseek_v3": lambda: deepseek_v3(**DYNAMIC),
    "deepseek_v32": lambda: deepseek_v32(**DYNAMIC),
}
REACH = (200, 64, 65, 30, 256, 130)  # of six sequences: within the trained 64 tokens, just beyond, and far beyond
LENGTHS = (150, 60, 65, 30, 40, 129)
native = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="no native build")
BACKENDS = ["reference", pytest.param("cpu", marks=native)]


def fresh_logits(name: str, ids: list[int]) -> torch.Tensor:
    """Logits of a new model, since Transformers' model keeps the frequencies of an earlier longer text."""
    return transformers_logits(random_model(CONFIGS[name]()), ids)


@cache
def texts(name: str) -> tuple[Any, list[list[int]], list[torch.Tensor]]:
    """A model, the sequences' tokens, and Transformers' logits of each, float32 [length, V], for texts as long as its reach."""
    model = random_model(CONFIGS[name]())
    ids = [random_ids(model.config, n, seed=i) for i, n in enumerate(REACH)]
    logits = [fresh_logits(name, text)[:n] for text, n in zip(ids, LENGTHS, strict=True)]
    return model, [text[:n] for text, n in zip(ids, LENGTHS, strict=True)], logits


def made(name: str, backend: str) -> Runner:
    model = texts(name)[0]
    graph, weights = rules.apply(build_graph(model.config))[0], weights_of(model)
    if backend == "reference":
        return runner(ReferenceBackend(), graph, weights)
    return runner(cpu.CpuBackend(threads=2), graph, packed_weights(weights, "fp32"))


def reach(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


@pytest.mark.parametrize("phase", [PREFILL, DECODE])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_in_any_batch_and_chunks(name: str, backend: str, phase: int) -> None:
    _, ids, expected = texts(name)
    run, rng = made(name, backend), random.Random(phase)
    alone, blocks = [], [run.sequence() for _ in ids]
    for text, own in zip(ids, REACH, strict=True):
        alone.append(run_step(run.plan, run.store, [Part(run.sequence(), text, phase)], reach=reach(own)).logits)
    actual: list[list[torch.Tensor]] = [[] for _ in ids]
    while left := [i for i, text in enumerate(ids) if blocks[i].tokens < len(text)]:
        chosen = rng.sample(left, rng.randint(1, len(left)))
        parts = []
        for i in chosen:
            begin = blocks[i].tokens
            parts.append(Part(blocks[i], ids[i][begin : begin + rng.randint(1, 70)], phase))
        counts = [len(part.ids) for part in parts]
        logits = run_step(run.plan, run.store, parts, reach=reach(*(REACH[i] for i in chosen))).logits
        for i, rows in zip(chosen, logits.split(counts), strict=True):
            actual[i].append(rows)
    for rows, whole, truth in zip(map(torch.cat, actual), alone, expected, strict=True):
        close(rows, truth)
        close(whole, truth)
        if backend == "cpu" and phase == DECODE:  # the same form of attention in both phases
            assert torch.equal(rows, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_reach_each_step_uses_its_own_length(backend: str) -> None:
    ids = texts("llama")[1]
    run = made("llama", backend)
    parts = [Part(run.sequence(), text) for text in ids]
    logits = run_step(run.plan, run.store, parts).logits.split(LENGTHS)
    for rows, text in zip(logits, ids, strict=True):
        close(rows, fresh_logits("llama", text))


@native
def test_both_backends_rotate_keys_equally() -> None:
    _, ids, _ = texts("llama")
    keys = []
    for backend in ("reference", "cpu"):
        run = made("llama", backend)
        parts = [Part(run.sequence(), text) for text in ids]
        run_step(run.plan, run.store, parts, reach=reach(*REACH))
        keys.append([run.store.read(0, p.blocks.table(), len(p.ids))[0] for p in parts])
    for one, other in zip(*keys, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("wrong", [(), (64,), (64, 64, 64), (64, 0), (-1, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_invalid_reach_is_rejected(backend: str, wrong: tuple[int, ...]) -> None:
    run = made("llama", backend)
    parts = [Part(run.sequence(), [1, 2, 3]) for _ in range(2)]
    with pytest.raises((ValueError, BackendError), match="reach"):
        run_step(run.plan, run.store, parts, reach=reach(*wrong))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rope_types_ignore_it(backend: str) -> None:
    model = random_model(llama(max_position_embeddings=64, **rope("yarn", factor=4.0, original_max_position_embeddings=16)))
    graph, weights = build_graph(model.config), weights_of(model)
    chosen = ReferenceBackend() if backend == "reference" else cpu.CpuBackend(threads=2)
    run = runner(chosen, graph, weights if backend == "reference" else packed_weights(weights, "fp32"))
    one, other = (run_step(run.plan, run.store, [Part(run.sequence(), [5, 6, 7])], reach=r).logits for r in (None, reach(200)))
    assert torch.equal(one, other)
