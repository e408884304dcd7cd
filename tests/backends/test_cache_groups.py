"""Models with full and windowed layers in a cache of groups: releasing blocks never changes a bit of the logits."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.cache import HOLE, Forgetting, Groups
from deepseek_optimizer.errors import BackendError, DroppedTokensError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.cache_groups import group_layers, group_spans
from deepseek_optimizer.models import build_graph
from support.family_configs import deepseek_v4, gemma2, gemma3_text, olmo3
from support.models import random_model, weights_of
from support.steps import Part, Runner, run_step

from .cpu.packing import packed_weights

BACKENDS: dict[str, Any] = {"reference": ReferenceBackend, "cpu": CpuBackend}
MODELS = {"gemma2": gemma2, "gemma3": gemma3_text, "olmo3": olmo3, "deepseek_v4": deepseek_v4}
BLOCKS = 200


def backend_of(name: str) -> Any:
    if name == "cpu" and (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    return BACKENDS[name]()


class Pair:
    """The same plan over a cache in one group, and over one in several that releases blocks as soon as possible."""

    def __init__(self, backend: Any, config: Any, kv: str, spare: int) -> None:
        model = random_model(config)
        plain = rules.apply(build_graph(config))[0]
        grouped = group_layers(plain)
        assert grouped.cache.groups > 1
        weights = packed_weights(weights_of(model), "fp32")
        groups = tuple(None if span is None else Forgetting(*span, spare) for span in group_spans(grouped))
        self.vocab, self.group_of = plain.vocab_size, grouped.cache.group_of
        self.plain = self._runner(backend, plain, weights, kv, (None,))
        self.grouped = self._runner(backend, grouped, weights, kv, groups)

    @staticmethod
    def _runner(backend: Any, graph: Any, weights: Any, kv: str, groups: Groups) -> Runner:
        return Runner(backend.compile(graph, weights), backend.new_store(graph, kv, BLOCKS), groups)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_releasing_changes_no_bit(backend: str, model: str, kv: str, seed: int) -> None:
    """Random chunks, batches, forks, rejected drafts and crops in both phases, with the same steps over both caches."""
    rng = random.Random(seed)
    config = MODELS[model](sliding_window=rng.choice((5, 32, 37, 64, 70)))
    pair = Pair(backend_of(backend), config, kv, spare=rng.choice((0, 20, 40)))
    live = [(pair.plain.sequence(), pair.grouped.sequence())]
    released = 0
    for _ in range(16):
        if len(live) < 3 and rng.random() < 0.3:
            live.append(tuple(own.fork() for own in rng.choice(live)) if rng.random() < 0.6 else
                        (pair.plain.sequence(), pair.grouped.sequence()))  # fmt: skip
        phase, chosen = rng.choice((PREFILL, DECODE)), rng.sample(live, rng.randint(1, len(live)))
        ids = [[rng.randrange(pair.vocab) for _ in range(rng.choice((1, 40, 70) if phase else (1, 4)))] for _ in chosen]
        logits = [
            run_step(runner.plan, runner.store, [Part(own[n], new, phase) for own, new in zip(chosen, ids, strict=True)]).logits
            for n, runner in enumerate((pair.plain, pair.grouped))
        ]
        assert torch.equal(*logits)
        for plain, grouped in chosen:
            drafts = rng.choice((0, 0, min(3, plain.tokens)))
            plain.crop(plain.tokens - drafts)
            grouped.crop(grouped.tokens - drafts)  # before anything is released
            grouped.forget()
            released += len(grouped.tables[-1].holes)
            if rng.random() < 0.05:
                target = rng.randrange(plain.tokens + 1)
                if grouped.nearest(target) < target:
                    with pytest.raises(DroppedTokensError):
                        grouped.crop(target)
                target = grouped.nearest(target)
                plain.crop(target)
                grouped.crop(target)
        pair.grouped.store.release(pair.grouped.manager.high_water)
    assert released
    for plain, grouped in live:
        plain.free()
        grouped.free()
    assert pair.grouped.manager.free_blocks == BLOCKS


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_block_holds_one_group(backend: str) -> None:
    """A block of six layers in three groups has a third of the bytes, and is saved and copied as a whole."""
    made = backend_of(backend)
    plain = build_graph(
        gemma2(num_hidden_layers=6, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2)
    )
    grouped = group_layers(plain)
    assert grouped.cache.groups == 3 and made.block_bytes(plain, "bf16") == 3 * made.block_bytes(grouped, "bf16")
    whole, store = made.new_store(plain, "bf16", 4), made.new_store(grouped, "bf16", 4)
    assert whole.saved_bytes == 3 * store.saved_bytes and store.block_bytes == made.block_bytes(grouped, "bf16")


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_layers_are_read_from_their_groups_blocks(backend: str) -> None:
    pair = Pair(backend_of(backend), gemma3_text(), "fp32", spare=0)
    ids = list(range(1, 70))
    plain, grouped = pair.plain.sequence(), pair.grouped.sequence()
    run_step(pair.plain.plan, pair.plain.store, [Part(plain, ids)])
    run_step(pair.grouped.plan, pair.grouped.store, [Part(grouped, ids)])
    table = np.array([pair.grouped.manager.allocate(1)[0] for _ in range(3)], np.int32)
    for layer in range(4):
        own = grouped.table(pair.group_of(layer))
        expected = pair.plain.store.read(layer, plain.table(), 69)
        for source, target in zip(own, table, strict=True):
            pair.grouped.store.write_block(int(target), pair.grouped.store.read_block(int(source)))
        for where in (own, table):
            for a, b in zip(expected, pair.grouped.store.read(layer, where, 69), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_missing_blocks_are_errors(backend: str) -> None:
    """A hole is accepted only in a group whose layers all have windows, and only where no row sees it."""
    pair = Pair(backend_of(backend), gemma2(), "fp32", spare=0)
    sequence = pair.grouped.sequence()
    run_step(pair.grouped.plan, pair.grouped.store, [Part(sequence, [1] * 200)])
    sequence.forget()
    for group, place in ((0, 0), (1, 5)):
        blocks = sequence.tables[group].blocks
        block, blocks[place] = blocks[place], HOLE
        step = Part(sequence, [1])
        with pytest.raises((BackendError, ValueError), match="block_table"):
            run_step(pair.grouped.plan, pair.grouped.store, [step])
        blocks[place] = block
        sequence.crop(200)
    with pytest.raises((BackendError, ValueError), match="block_table"):  # tables of one group only
        run_step(pair.grouped.plan, pair.grouped.store, [Part(pair.plain.sequence(), [1])])
    assert run_step(pair.grouped.plan, pair.grouped.store, [Part(sequence, [1])]).logits.isfinite().all()
