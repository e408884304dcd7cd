"""Log probabilities of prompt tokens: the same for every chunking, batch, preemption and state of the prefix cache."""

import random

import numpy as np
import pytest

from deepseek_optimizer import RequestError
from deepseek_optimizer.cache import Forgetting
from deepseek_optimizer.engine.engine import Completion
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.engine_runs import run
from support.mock_model import VOCAB, blocks_in_use, expected, groups_of, logits_of, make_core, places

WINDOW = Forgetting(window=64, sinks=4)


def sampling(max_tokens=5, **fields):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)


def check(answer, prompt, top, groups=(None,)):
    actual = answer.prompt_logprobs
    assert actual.complete and len(actual) == len(prompt) - 1 and actual.top_tokens.shape == (len(prompt) - 1, top)
    for n in range(len(actual)):
        seen = [prompt[place] for group in groups for place in places(n + 1, group)]
        logits = logits_of(seen).astype(np.float64)
        right = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-right, kind="stable")
        assert actual.tokens[n] == prompt[n + 1]
        assert actual.logprobs[n] == pytest.approx(right[prompt[n + 1]], abs=1e-5)
        assert actual.ranks[n] == 1 + (right > right[prompt[n + 1]]).sum()
        assert actual.top_tokens[n].tolist() == order[:top].tolist()
        np.testing.assert_allclose(actual.top_logprobs[n], right[order[:top]], atol=1e-5)


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("options", [{}, {"step_tokens": 7}, {"prefix_cache": False}, {"chunk": 32}, {"step_tokens": 1}])
def test_they_equal_the_model(options, top):
    rng = random.Random(3)
    core = make_core(**options)
    texts = [[rng.randrange(VOCAB - 1) for _ in range(length)] for length in (1, 2, 31, 32, 33, 100)]
    requests = [Request(text, sampling(), id=str(n), prompt_logprobs=top) for n, text in enumerate(texts)]
    requests += [Request(text, sampling(), id=f"plain {n}") for n, text in enumerate(texts)]
    actual = run(core, *requests)
    for n, text in enumerate(texts):
        check(actual[str(n)], text, top)
        assert actual[f"plain {n}"].prompt_logprobs is None
        assert actual[str(n)].token_ids == actual[f"plain {n}"].token_ids == expected(text, 5, None)
    assert blocks_in_use(core) == 0


@pytest.mark.parametrize(
    "options", [{"slots": 12}, {"forgetting": (None, WINDOW)}, {"forgetting": WINDOW}, {"cache_window": 320}]
)
def test_states_groups_and_windows(options):
    core = make_core(blocks=90, context=4_000, step_tokens=48, batch_size_range=(1, 4), **options)
    groups = groups_of(options.get("forgetting"))
    texts = [[(n * 7 + start) % 53 for n in range(250)] for start in range(3)]
    for repeated in range(2):
        requests = [Request(text, sampling(9), id=f"{repeated} {n}", prompt_logprobs=1) for n, text in enumerate(texts)]
        for request in requests:
            core.add(request)
        result = {r.id: Completion() for r in requests}
        for step in range(10_000):
            for output in core.step():
                result[output.request_id].add(output)
            if step in (3, 9):
                core.scheduler.preempt(core.scheduler.running[-1])
            if core.idle:
                break
        for request in requests:
            check(result[request.id], request.prompt, 1, groups)
            assert result[request.id].token_ids == expected(request.prompt, 9, None, options.get("forgetting"))
    assert blocks_in_use(core) == 0


def test_a_prompt_longer_than_the_window():
    """Tokens that the window has dropped are not seen, but every token of the prompt has a log probability."""
    core = make_core(blocks=60, context=2_000, cache_window=256, step_tokens=64)
    prompt = [(n * 11) % 53 for n in range(900)]
    answer = run(core, Request(prompt, sampling(3), id="a", prompt_logprobs=0))["a"]
    actual = answer.prompt_logprobs
    assert actual.complete and len(actual) == 899 and (actual.logprobs < 0).all() and answer.dropped_tokens > 0
    assert len(answer.token_ids) == 3


def test_logits_elsewhere_are_copied():
    """Of rows on a device, those that log probabilities need are copied to the host."""
    core, prompt = make_core(step_tokens=30), [n % 41 for n in range(100)]
    core.runner.on_host = False
    requests = [Request(prompt, sampling(7), id="a", prompt_logprobs=2), Request(prompt[:50], sampling(7), id="b")]
    actual = run(core, *requests)
    check(actual["a"], prompt, 2)
    assert all(actual[r.id].token_ids == expected(r.prompt, 7, None) for r in requests)


def test_a_cached_prompt_is_processed_again_and_stays_cached():
    core, prompt = make_core(), list(range(50)) * 2
    first = run(core, Request(prompt, sampling(), id="a", prompt_logprobs=2))["a"]
    assert run(core, Request(prompt, sampling(), id="b"))["b"].cached_tokens == 96
    again = run(core, Request(prompt, sampling(), id="c", prompt_logprobs=2))["c"]
    assert again.cached_tokens == 0 and first.token_ids == again.token_ids
    check(first, prompt, 2)
    check(again, prompt, 2)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_a_preempted_request_continues_its_list(steps):
    core, prompt = make_core(step_tokens=40), [n % 37 for n in range(150)]
    core.add(Request(prompt, sampling(12), id="a", prompt_logprobs=1))
    result = Completion()
    for _ in range(steps):
        for output in core.step():
            result.add(output)
    core.scheduler.preempt(core.scheduler.running[0])
    processed = core.metrics.prompt_tokens
    while not core.idle:
        for output in core.step():
            result.add(output)
    check(result, prompt, 1)
    assert result.token_ids == expected(prompt, 12, None)
    if steps > 4:  # after the whole prompt, it comes from the prefix cache
        assert core.metrics.prompt_tokens - processed < 40


@pytest.mark.parametrize("seed", range(6))
def test_random_batches_in_a_small_cache(seed):
    rng = random.Random(seed)
    proposers = [(PromptLookupProposer(2, 1), 4)] if seed % 2 else None
    core = make_core(
        blocks=16, chunk=rng.choice([None, 32]), step_tokens=rng.choice([16, 64]), batch_size_range=(1, 6), proposers=proposers
    )
    shared = [rng.randrange(VOCAB - 1) for _ in range(70)]
    requests = []
    for n in range(30):
        text = shared[: rng.randrange(70)] + [rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 60))]
        requests.append(Request(text, sampling(rng.randrange(40)), id=str(n), prompt_logprobs=rng.choice([None, 0, 2])))
    actual = run(core, *requests)
    for request in requests:
        answer = actual[request.id]
        assert answer.finish == "length"
        assert answer.token_ids == expected(request.prompt, request.sampling.max_tokens, None)
        if request.prompt_logprobs is not None:
            check(answer, request.prompt, request.prompt_logprobs)
    assert blocks_in_use(core) == 0


def test_the_logits_of_a_step_are_bounded():
    core, rows = make_core(), []
    core.scheduler._max_prompt_logits = 10
    step = core.runner.step

    def seen(parts, wanted, **named):
        rows.append(len(wanted))
        return step(parts, wanted, **named)

    core.runner.step = seen
    texts = [[n] * 60 for n in range(3)]
    actual = run(core, *(Request(text, sampling(), id=str(n), prompt_logprobs=0) for n, text in enumerate(texts)))
    for n, text in enumerate(texts):
        check(actual[str(n)], text, 0)
    assert max(rows) <= 10 + 3


def test_no_tokens_are_generated_for_max_tokens_0():
    core, prompt = make_core(), list(range(40))
    answer = run(core, Request(prompt, sampling(0), id="a", prompt_logprobs=0))["a"]
    assert (answer.token_ids, answer.text, answer.finish) == ([], "", "length")
    check(answer, prompt, 0)
    assert run(core, Request(prompt, sampling(), id="b"))["b"].cached_tokens == 32
    whole = make_core(context=40)
    assert run(whole, Request(prompt, sampling(0), id="a"))["a"].finish == "length"


def test_non_finite_logits_fail_the_request_alone():
    core = make_core(step_tokens=20)
    core.runner.broken = {59}
    bad = [1] * 30 + [59] + [2] * 40
    actual = run(core, Request(bad, sampling(), id="bad", prompt_logprobs=1), Request([3] * 50, sampling(), id="good"))
    assert actual["bad"].finish == "error" and "finite" in actual["bad"].error
    assert actual["good"].token_ids == expected([3] * 50, 5, None) and blocks_in_use(core) == 0


def test_invalid_requests():
    for value in (-1, 21, True, "1"):
        with pytest.raises(RequestError, match="prompt_logprobs"):
            Request([1], prompt_logprobs=value)
    with pytest.raises(RequestError, match="embed"):
        Request([1], prompt_logprobs=0, embed=True)
