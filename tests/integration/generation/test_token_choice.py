"""generate() with tokens that the backend chooses: the same tokens, streams, caches and random numbers as in single steps."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from deepseek_optimizer import PagedCache
from deepseek_optimizer.backends import cpu
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.integration.generation import token_choice
from deepseek_optimizer.integration.generation.token_choice import TokenChoices
from support.streamers import Recorder

from ..conftest import make_pair

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))


@pytest.fixture(scope="module")
def pair():
    return make_pair(backend="cpu")


@pytest.fixture
def calls(pair, monkeypatch):
    """Counts the steps that were run singly and in calls."""
    counts, plan = Counter(), pair.fast.dso.plan
    run, decode = plan.run, plan.decode

    def counted(*args):
        decoded = decode(*args)
        counts["calls"] += 1
        counts["steps"] += decoded.steps
        counts["chosen"] += len(decoded.tokens)
        return decoded

    monkeypatch.setattr(plan, "run", lambda *args: (counts.update(single=1), run(*args))[1])
    monkeypatch.setattr(plan, "decode", counted)
    return counts


def single_and_several(pair, monkeypatch, ids, seed=0, **options):
    """What generate returns in single steps and in calls of several, with the generator's state afterwards."""
    made = []
    for several in (False, True):
        with monkeypatch.context() as patch:
            if not several:
                patch.setattr(TokenChoices, "of", lambda *args, **kwargs: None)
            torch.manual_seed(seed)
            made.append((pair.fast.generate(ids, **options), torch.get_rng_state()))
    return made


def random_request(rng, pair):
    rows = rng.choice([1, 1, 1, 2, 4])
    lengths = [rng.randrange(1, 70) for _ in range(rows)]
    options = {
        "attention_mask": pair.mask(*lengths), "max_new_tokens": rng.choice([1, 2, 31, 32, 33, 80]), "pad_token_id": 0,
        "eos_token_id": rng.choice([None, 2, list(range(2, 8)), list(range(2, 40))]), "do_sample": rng.random() < 0.6,
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3, 0.8]),
        **rng.choice([{}, {}, {"min_new_tokens": 20}, {"min_length": 50}, {"min_new_tokens": 3, "min_length": 33}]),
    }  # fmt: skip
    if options["do_sample"]:
        options |= {
            "temperature": rng.choice([1.0, 0.6, 1.5]), "top_k": rng.choice([0, 1, 5, 50, 10**4]),
            "top_p": rng.choice([1.0, 0.9, 0.3]), "min_p": rng.choice([None, 0.05, 1.0]),
        }  # fmt: skip
    if rows == 1 and options["do_sample"] and rng.random() < 0.3:
        options["num_return_sequences"] = 3
    return pair.ids(*lengths, seed=rng.randrange(1000)), options


@pytest.mark.parametrize("seed", range(30))
def test_random_requests(pair, calls, monkeypatch, seed):
    rng = random.Random(seed)
    ids, options = random_request(rng, pair)
    (plain, state), (fast, after) = single_and_several(pair, monkeypatch, ids, seed, **options)
    assert torch.equal(plain, fast) and torch.equal(state, after)
    assert plain.shape[1] <= ids.shape[1] + 1 or calls["calls"]


@pytest.mark.parametrize("seed", range(6))
def test_builds_of_torch_that_draw_otherwise(pair, calls, monkeypatch, seed):
    """Torch itself draws the variates then."""
    monkeypatch.setattr(token_choice, "draws_as_expected", lambda: False)
    rng = random.Random(seed)
    ids, options = random_request(rng, pair)
    (plain, state), (fast, after) = single_and_several(pair, monkeypatch, ids, seed, **options | {"do_sample": True})
    assert torch.equal(plain, fast) and torch.equal(state, after)


def test_many_steps_run_in_a_call(pair, calls, monkeypatch):
    monkeypatch.setattr(token_choice, "_SECONDS", 60.0)
    pair.fast.generate(pair.ids(10), max_new_tokens=100, do_sample=False, eos_token_id=None)
    assert calls == {"single": 1, "calls": 4, "steps": 99, "chosen": 99}  # calls end at tokens 32, 64 and 96 of the cache


def test_calls_are_bounded_in_time(pair, calls, monkeypatch):
    monkeypatch.setattr(token_choice, "_SECONDS", 0.0)
    pair.fast.generate(pair.ids(10), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert calls["calls"] == calls["steps"] == 19


@pytest.mark.parametrize("do_sample", [False, True])
def test_streamers_get_every_token_in_order(pair, monkeypatch, do_sample):
    streamed = []
    for several in (False, True):
        streamer = Recorder()
        with monkeypatch.context() as patch:
            if not several:
                patch.setattr(TokenChoices, "of", lambda *args, **kwargs: None)
            torch.manual_seed(1)
            out = pair.fast.generate(pair.ids(7), max_new_tokens=50, do_sample=do_sample, streamer=streamer)
        assert streamer.ended and streamer.pieces[1:] == [[token] for token in out[0, 7:].tolist()]
        streamed.append(streamer.pieces)
    assert streamed[0] == streamed[1]


def test_threads_draw_different_numbers(pair):
    torch.manual_seed(0)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: pair.fast.generate(pair.ids(5), max_new_tokens=40, do_sample=True, top_k=0), range(8)))
    assert len({tuple(text[0].tolist()) for text in texts}) == 8


class After(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)


class Unchanged(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {"stopping_criteria": StoppingCriteriaList([After()])},
        {"logits_processor": [Unchanged()]},
        {"no_repeat_ngram_size": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"return_dict_in_generate": True, "output_logits": True},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "renormalize_logits": True},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_requests_that_need_every_step(pair, calls, options):
    pair.fast.generate(pair.ids(5), max_new_tokens=12, pad_token_id=0, **{"do_sample": False, **options})
    assert not calls["calls"] and calls["single"] > 5


@pytest.mark.parametrize("do_sample", [False, True])
def test_undecided_tokens_are_chosen_here(pair, monkeypatch, do_sample):
    plan, rng = pair.fast.dso.plan, random.Random(2)
    decode = plan.decode

    def hesitant(batch, store, call):
        """Leaves the last step of a call to the caller."""
        decoded = decode(batch, store, call)
        if decoded.logits is None and rng.random() < 0.5:
            decoded.logits, decoded.tokens = batch.logits, decoded.tokens[:-1]
        return decoded

    monkeypatch.setattr(plan, "decode", hesitant)
    monkeypatch.setattr(token_choice, "draws_as_expected", lambda: False)  # the variates are returned by their number
    options = {"max_new_tokens": 60, "do_sample": do_sample, "top_k": 30, "eos_token_id": [3, 4], "pad_token_id": 0}
    for seed in range(4):
        (plain, state), (fast, after) = single_and_several(pair, monkeypatch, pair.ids(9, 9, seed=seed), seed, **options)
        assert torch.equal(plain, fast) and torch.equal(state, after)


def test_a_conversation_with_one_cache(pair):
    """Each turn has the history and the cache of the previous one; a token that was not run yet is run by the next turn."""
    cache, ids = PagedCache(pair.fast), pair.ids(6)
    for turn in range(3):
        out = pair.fast.generate(ids, max_new_tokens=40, do_sample=False, **{cache_name(): cache})
        assert torch.equal(out, pair.plain.generate(ids, max_new_tokens=40, do_sample=False))
        assert cache.get_seq_length() == out.shape[1] - 1
        ids = torch.cat([out, pair.ids(4, seed=turn)], dim=1)


def test_the_context_and_the_cache_end_as_in_single_steps(calls):
    pair = make_pair("llama-gqa", backend="cpu")
    pair.fast.dso.graph.max_positions = 50
    with pytest.warns(OptimizerWarning, match="context of 50"):
        out = pair.fast.generate(pair.ids(10), max_new_tokens=90, do_sample=False, eos_token_id=None)
    assert torch.equal(out, pair.plain.generate(pair.ids(10), max_new_tokens=41, do_sample=False, eos_token_id=None))


def test_errors_leave_the_cache_and_the_generator_as_they_were(pair, monkeypatch):
    cache, plan = PagedCache(pair.fast), pair.fast.dso.plan
    out = pair.fast.generate(pair.ids(6), max_new_tokens=4, do_sample=False, **{cache_name(): cache})
    tokens = [sequence.tokens for sequence in cache.state.sequences]

    def fails(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(plan, "decode", fails)
        torch.manual_seed(0)
        with pytest.raises(MemoryError):
            pair.fast.generate(out, max_new_tokens=9, do_sample=True, **{cache_name(): cache})
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.empty(1, pair.plain.config.vocab_size).exponential_()  # of the token after the prompt
    assert torch.equal(state, torch.get_rng_state())
    assert cache.get_seq_length() == tokens[0] + 1  # the prompt's last token has been run
    again = pair.fast.generate(out, max_new_tokens=9, do_sample=False, **{cache_name(): cache})
    assert torch.equal(again, pair.plain.generate(out, max_new_tokens=9, do_sample=False))
