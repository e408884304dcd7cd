"""Drafts of a draft model: its own greedy text, whatever was rejected before."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.backends.base import BLOCK_TOKENS
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.cache import BlockManager, SequenceBlocks
from deepseek_optimizer.engine.runner import Runner
from deepseek_optimizer.engine.sequence import Sequence
from deepseek_optimizer.engine.speculative.draft_model import DraftModelProposer
from support.models import CASES, random_ids, random_model

native = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


@pytest.fixture(scope="module")
def plain():
    return random_model(CASES["llama-gqa"]())


@pytest.fixture(scope="module", params=["reference", pytest.param("cpu", marks=native)])
def runtime(request, plain):
    fast = copy.deepcopy(plain)
    DynamicGraphOptimizer(fast, config=DeepSeekConfig(precision="fp32", backend=request.param)).optimize()
    runtime = fast.dso
    runtime.kept = fast  # the runtime refers to it weakly
    return runtime


def proposer_of(runtime, *, bytes=1 << 20, several=True, context=1_000, step=16):
    decodes = several and runtime.backend.capabilities.decode_calls
    runner = Runner(runtime.plan, runtime.new_arena(bytes), runtime.graph.vocab_size, decodes=decodes)
    return DraftModelProposer(runner, context, step)


def sequence(index, tokens):
    return Sequence(index, list(tokens), SequenceBlocks(BlockManager(4)))


def greedy(plain, tokens, count):
    """The definition: Transformers' greedy text."""
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)  # otherwise token 0 would be taken for padding
    out = plain.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(tokens) :].tolist()


@pytest.mark.parametrize("several", [True, False])
def test_drafts_are_the_greedy_text(runtime, plain, several):
    proposer, rng = proposer_of(runtime, several=several), random.Random(0)
    sequences = [sequence(i, random_ids(plain.config, n, i)) for i, n in enumerate((1, 21, 50))]
    for _ in range(6):
        most = [rng.choice((0, 1, 5, 40)), rng.randint(1, 6), rng.randint(1, 6)]
        drafts = proposer.propose(sequences, most)
        for s, draft, count in zip(sequences, drafts, most, strict=True):
            assert draft.q is None
            assert draft.tokens == (greedy(plain, s.tokens, count) if count else [])
            kept = rng.randint(0, len(draft.tokens))
            s.tokens += [*draft.tokens[:kept], rng.randrange(plain.config.vocab_size)]


def test_drafts_end_at_the_context(runtime, plain):
    proposer = proposer_of(runtime, context=20)
    s = sequence(0, random_ids(plain.config, 18, 3))
    assert proposer.propose([s], [5])[0].tokens == greedy(plain, s.tokens, 2)
    s.tokens += [1, 2]
    assert not proposer.ready(s)
    assert proposer.propose([s], [5])[0].tokens == []


def test_a_full_cache_ends_drafting(runtime, plain):
    """What fits is drafted; after another sequence has ended, there is room again."""
    proposer = proposer_of(runtime, bytes=100_000)
    manager = proposer._runner.memory.manager
    held = sequence(7, random_ids(plain.config, BLOCK_TOKENS * (manager.num_blocks - 1), 5))
    assert proposer.propose([held], [1])[0].tokens == greedy(plain, held.tokens, 1)
    s = sequence(1, random_ids(plain.config, BLOCK_TOKENS - 2, 6))
    assert proposer.propose([s], [6])[0].tokens == greedy(plain, s.tokens, 3)  # the third is not processed
    held.tokens += [1, 2]
    assert proposer.propose([held, s], [2, 2])[0].tokens == []
    proposer.forget(held)
    assert proposer.propose([s], [6])[0].tokens == greedy(plain, s.tokens, 6)
    proposer.forget(s)
    assert manager.free_blocks == manager.num_blocks


def test_after_an_error_the_cache_is_right(runtime, plain, monkeypatch):
    proposer = proposer_of(runtime)
    s = sequence(0, random_ids(plain.config, 25, 8))
    proposer.propose([s], [4])
    s.tokens += greedy(plain, s.tokens, 2)
    run = Runner.step
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "step", lambda *args, **kwargs: (run(*args, **kwargs), 1 / 0)[0])
        with pytest.raises(ZeroDivisionError):
            proposer.propose([s], [4])
    manager = proposer._runner.memory.manager
    assert manager.free_blocks == manager.num_blocks
    assert proposer.propose([s], [4])[0].tokens == greedy(plain, s.tokens, 4)


@native
@pytest.mark.parametrize("case", ["lfm2-mixed", "qwen3_5_text-mixed", "mistral-tied-window"])
def test_rejected_drafts_do_not_cost_the_whole_text(case, monkeypatch):
    """Recurrent states cannot be cropped, and blocks outside a window are freed."""
    plain, rng = random_model(CASES[case]()), random.Random(1)
    fast = copy.deepcopy(plain)
    DynamicGraphOptimizer(fast, config=DeepSeekConfig(precision="fp32", kv_cache="fp32")).optimize()
    proposer, counts, reserve = proposer_of(fast.dso, bytes=4 << 20, step=512), [], Runner.reserve

    def counted(self, sequences, tokens):
        counts.append(sum(tokens))
        reserve(self, sequences, tokens)

    monkeypatch.setattr(Runner, "reserve", counted)
    s = sequence(0, random_ids(plain.config, 150, 4))
    proposer.catch_up([s])
    for n in range(BLOCK_TOKENS + 4):
        counts.clear()
        drafts = proposer.propose([s], [4])[0].tokens
        assert sum(counts) <= 2 * 4
        if n % 6 == 0:
            assert drafts == greedy(plain, s.tokens, 4)
        s.tokens += [*drafts[: rng.randint(0, 2)], rng.randrange(plain.config.vocab_size)]
    proposer.forget(s)
    manager = proposer._runner.memory.manager
    assert manager.free_blocks == manager.num_blocks
    assert manager.slots is None or manager.slots.free_blocks == manager.slots.num_blocks


def test_nothing_is_processed_beyond_the_context(runtime, plain):
    proposer = proposer_of(runtime, context=20)
    s = sequence(0, random_ids(plain.config, 120, 3))
    proposer.catch_up([s])
    assert proposer.propose([s], [3])[0].tokens == []
    assert proposer._runner.memory.manager.free_blocks == proposer._runner.memory.manager.num_blocks


def test_after_an_error_while_catching_up_the_cache_is_right(runtime, plain, monkeypatch):
    proposer = proposer_of(runtime)
    s = sequence(0, random_ids(plain.config, 100, 8))
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "step", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            proposer.catch_up([s])
    assert proposer.propose([s], [4])[0].tokens == greedy(plain, s.tokens, 4)
