"""The engine with a model that is a hash of its context: each request gets its own text, whatever else is in the batch."""

import random

import numpy as np
import pytest

from deepseek_optimizer import CheckpointChangedError, RequestError
from deepseek_optimizer.cache.prefix_cache import keys
from deepseek_optimizer.engine.draft import Draft
from deepseek_optimizer.engine.engine import Completion, Engine
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.engine_runs import run
from support.mock_model import EOS, VOCAB, blocks_in_use, expected, logits_of, make_core
from support.scripted_proposer import ScriptedProposer

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def prompts(rng, count, longest=120):
    return [[rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"step_tokens": 7}, {"stall": 2.0}, {"chunk": 32}])
@pytest.mark.parametrize("drafts", [False, True])
def test_every_request_gets_its_own_text(options, drafts):
    rng = random.Random(1)
    chunk = options.pop("chunk", None) if "chunk" in options else None
    proposers = [(PromptLookupProposer(2, 1), 4)] if drafts else None
    core = make_core(chunk=chunk, proposers=proposers, batch_size_range=(1, 8), **options)
    texts = prompts(rng, 30)
    texts += [texts[0] + [1, 2, 3], texts[0], texts[0]]  # with common prefixes
    requests = [
        Request(p, SamplingParams(temperature=0, max_tokens=rng.randrange(1, 60)), id=str(n)) for n, p in enumerate(texts)
    ]
    actual = run(core, *requests)
    for request in requests:
        text = expected(request.prompt, request.sampling.max_tokens)
        answer = actual[request.id]
        assert answer.token_ids == text
        assert answer.finish == ("stop" if text[-1] == EOS else "length")
        assert answer.text == "".join(chr(65 + t) for t in text if t != EOS)
    assert blocks_in_use(core) == 0
    assert all(sequences <= 8 for _, sequences in core.runner.seen)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_in_a_small_cache(seed):
    """Requests arrive, are cancelled and preempted at random; those that finish have the right text."""
    rng = random.Random(seed)
    script = {}
    proposers = [(ScriptedProposer(script, 0.6, VOCAB, seed), 3)] if seed % 2 else None
    core = make_core(
        blocks=rng.randrange(10, 24), chunk=rng.choice([None, 32, 64]), proposers=proposers,
        step_tokens=rng.choice([16, 64, 512]), batch_size_range=(1, rng.randrange(2, 12)), stall=rng.choice([None, 3.0]),
    )  # fmt: skip
    shared = prompts(rng, 3, 90)
    waiting = []
    for n in range(60):
        prompt = rng.choice(shared) + prompts(rng, 1, 50)[0] if rng.random() < 0.6 else prompts(rng, 1, 150)[0]
        max_tokens = rng.randrange(1, 80)
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=rng.random() < 0.5)
        salt, client = rng.choice(["", "a"]), rng.choice(["", "", "b", "c"])
        waiting.append(Request(prompt, sampling, id=str(n), priority=rng.randrange(3), salt=salt, client=client))
        script[n + 1] = prompt + expected(prompt, max_tokens, EOS if not sampling.ignore_eos else None)
    actual, cancelled, requests = {}, set(), {}
    while waiting or not core.idle:
        for _ in range(rng.randrange(4)):
            if waiting:
                request = waiting.pop(0)
                requests[request.id] = request
                actual[request.id] = Completion()
                core.add(request)
        if rng.random() < 0.05 and requests:
            victim = rng.choice(list(requests))
            if actual[victim].finish is None:
                core.cancel(victim)
                cancelled.add(victim)
        for output in core.step():
            assert actual[output.request_id].finish is None
            actual[output.request_id].add(output)
    for name, request in requests.items():
        eos = None if request.sampling.ignore_eos else EOS
        text = expected(request.prompt, request.sampling.max_tokens, eos)
        answer = actual[name]
        if answer.finish == "cancelled":
            assert name in cancelled and answer.token_ids == text[: len(answer.token_ids)]
        else:
            assert answer.finish in ("stop", "length") and answer.token_ids == text
    assert blocks_in_use(core) == 0
    assert core.scheduler.preemptions == core.metrics.preemptions


class Silent(ScriptedProposer):
    """Announces drafts, but returns fewer than there is room for, or none."""

    def propose(self, sequences, max_drafts):
        drafts = super().propose(sequences, max_drafts)
        return [Draft(d.tokens[: n % 3]) for n, d in enumerate(drafts, len(sequences[0].tokens))]


def test_reserved_room_for_drafts_that_are_not_made():
    prompt = [4, 5]
    script = {1: prompt + expected(prompt, 60, None)}
    core = make_core(proposers=[(Silent(script, 0.9, VOCAB), 4)])
    answer = run(core, Request(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), id="a"))["a"]
    assert answer.token_ids == script[1][2:] and core.drafting.accepted > 0


def test_preemption_changes_no_text():
    core = make_core(blocks=8, batch_size_range=(4, 4), prefix_cache=False)
    requests = [Request([n] * 40, SamplingParams(temperature=0, max_tokens=80, ignore_eos=True), id=str(n)) for n in range(4)]
    actual = run(core, *requests)
    assert core.scheduler.preemptions > 0
    for request in requests:
        assert actual[request.id].token_ids == expected(request.prompt, 80, None)


def test_waiting_begins_when_a_request_came():
    """Not when the step that was running then has ended."""
    core = make_core()
    core.clock.now = 5.0
    core.add(Request([1, 2, 3], GREEDY, id="a"), arrived=2.0)
    while not core.idle:
        core.step()
    assert core.metrics.first.sum > 3.0 and core.metrics.whole.sum > 3.0


def test_higher_priorities_run_first():
    core = make_core(batch_size_range=(1, 1))
    for n, priority in enumerate([2, 1, 0, 1]):
        core.add(Request([n], GREEDY, id=str(n), priority=priority))
    order = []
    while not core.idle:
        order += [o.request_id for o in core.step() if o.finish]
    assert order == ["2", "1", "3", "0"]


def test_a_long_prompt_does_not_stall_others():
    """While it is processed, every step generates a token for the others."""
    core = make_core(step_tokens=64, stall=3.0, blocks=256)
    core.add(Request([1], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), id="stream"))
    for _ in range(5):
        core.step()
    core.add(Request([2] * 3000, SamplingParams(temperature=0, max_tokens=2), id="long"))
    steps = 0
    while True:
        outputs = {o.request_id: o for o in core.step()}
        if "long" in outputs:
            break
        assert len(outputs["stream"].token_ids) == 1
        steps += 1
    assert steps >= 3000 // 64


def test_a_short_prompt_does_not_wait_for_a_long_one():
    core = make_core(step_tokens=64, blocks=400)
    core.add(Request([2] * 3000, SamplingParams(temperature=0, max_tokens=2), id="book"))
    core.step()
    core.add(Request([3] * 50, SamplingParams(temperature=0, max_tokens=2), id="question"))
    steps = 0
    while not any(o.request_id == "question" for o in core.step()):
        steps += 1
    assert steps <= 2
    while not core.idle:
        last = core.step()
    assert [o.request_id for o in last] == ["book"]


def test_a_short_prompt_does_not_wait_with_a_stream_running():
    """The short prompt gets half of the prompt tokens that are allowed with a stream, or every second fixed chunk."""
    for chunk in (None, 32):
        core = make_core(step_tokens=64, blocks=400, stall=2.0, chunk=chunk)
        core.add(Request([1], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True), id="stream"))
        for _ in range(4):
            core.step()
        core.add(Request([2] * 2000, SamplingParams(temperature=0, max_tokens=2), id="book"))
        core.step()
        book = next(r for r in core.scheduler.running if r.request.id == "book")
        core.add(Request([3] * 60, SamplingParams(temperature=0, max_tokens=2), id="question"))
        steps, before = 0, book.sequence.cached
        while not any(o.request_id == "question" for o in core.step()):
            steps += 1
        assert steps < 20 and before < book.sequence.cached < 1500


def test_a_request_without_allowed_tokens_ends_alone():
    """A grammar and a bias allow no second token, so that there is no inter-token latency to count."""
    core = make_core()
    bias = {t: -100.0 for t in range(VOCAB) if t != 5}

    class Once:
        finished = False

        def start(self):
            return self

        def mask(self, bits):
            bits[:] = 0 if self.taken else -1
            return True

        taken = 0

        def accept(self, token):
            self.taken += 1

    sampling = SamplingParams(temperature=0, logit_bias=bias, grammar=Once(), max_tokens=5)
    actual = run(core, Request([1], sampling, id="a"), Request([2], GREEDY, id="b"))
    assert actual["a"].token_ids == [5] and actual["a"].finish == "stop" and actual["b"].token_ids == expected([2], 20)


def test_preempted_embeddings_are_recomputed():
    core = make_core(step_tokens=20)
    core.add(Request([8] * 100, GREEDY, id="a", embed=True))
    core.step()
    core.step()
    core.scheduler.preempt(core.scheduler.running[0])
    while not core.idle:
        outputs = core.step()
    assert outputs[0].embedding == pytest.approx([8.0])


def test_blocks_held_by_other_users():
    """A request that cannot run although no other does fails after a few attempts."""
    core = make_core(blocks=8, prefix_cache=False)
    core.memory.manager.allocate(5)
    core.add(Request([1] * 60, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True), id="a"))
    for _ in range(200):
        outputs = core.step()
        if core.idle:
            break
    assert outputs[0].finish == "error" and outputs[0].transient and "kv_cache_memory" in outputs[0].error


def test_patience_restarts_with_each_request():
    core = make_core(blocks=4, prefix_cache=False)
    held = core.memory.manager.allocate(4)
    core.add(Request([1] * 10, GREEDY, id="a"))
    core.scheduler._admit = lambda *_: False  # as if the missing blocks were never free
    core.step()
    core.cancel("a")
    core.step()
    core.clock.now += 100
    core.add(Request([2] * 10, GREEDY, id="b"))
    assert core.step() == [] and not core.idle
    core.clock.now += 11
    (output,) = core.step()
    assert output.finish == "error" and output.transient
    assert blocks_in_use(core) == len(held)


def test_failed_drafts_are_skipped():
    class Poor(ScriptedProposer):
        def propose(self, sequences, max_drafts):
            raise MemoryError

    prompt = [4, 5]
    script = {1: prompt + expected(prompt, 20, None)}
    core = make_core(proposers=[(Poor(script, 1.0, VOCAB), 4)])
    assert run(core, Request(prompt, GREEDY, id="a"))["a"].token_ids == expected(prompt, 20)


def test_a_changed_draft_model_only_disables_drafts():
    class Changed(ScriptedProposer):
        def propose(self, sequences, max_drafts):
            raise CheckpointChangedError("was written to", file="draft.safetensors")

    prompt = [4, 5]
    script = {1: prompt + expected(prompt, 20, None)}
    core = make_core(proposers=[(Changed(script, 1.0, VOCAB), 4)])
    assert run(core, Request(prompt, GREEDY, id="a"))["a"].token_ids == expected(prompt, 20)
    assert core.drafting is None


def test_results_of_changed_weights_are_discarded():
    def changed():
        raise CheckpointChangedError("was written to", file="model.safetensors")

    core, prompt = make_core(), list(range(50)) * 2
    core.add(Request(prompt, GREEDY, id="a"))
    core.runner.before = changed
    with pytest.raises(CheckpointChangedError, match="model.safetensors: was written to"):
        core.step()
    assert core.prefix.known(keys(prompt, "", 3)) == 0
    core.cancel("a")
    assert [output.finish for output in core.step()] == ["cancelled"] and blocks_in_use(core) == 0
    assert core.prefix.known(keys(prompt, "", 3)) == 0


def test_a_grammar_that_fails_ends_its_request_alone():
    class Broken:
        finished = False

        def start(self):
            return self

        def mask(self, bits):
            return False

        def accept(self, token):
            raise RuntimeError("a bug")

    core = make_core()
    bad = SamplingParams(temperature=0, max_tokens=5, grammar=Broken())
    actual = run(core, Request([1], bad, id="bad"), Request([2], GREEDY, id="b"))
    assert actual["bad"].finish == "error" and "bug" not in actual["bad"].error and actual["b"].token_ids == expected([2], 20)
    assert blocks_in_use(core) == 0


def test_common_prefixes_are_computed_once():
    core = make_core()
    prompt = list(range(50)) * 2  # three full blocks, and four tokens
    first = run(core, Request(prompt, GREEDY, id="a"))["a"]
    assert first.cached_tokens == 0
    tokens = core.metrics.prompt_tokens
    again = run(core, Request([*prompt, 5], GREEDY, id="b"))["b"]
    assert again.cached_tokens == 96 and core.metrics.prompt_tokens - tokens == 5
    assert again.token_ids == expected([*prompt, 5], 20)
    other = run(core, Request(prompt, GREEDY, id="c", salt="another key"))["c"]
    assert other.cached_tokens == 0 and other.token_ids == first.token_ids


def test_identical_prompts_are_computed_once():
    core = make_core()
    prompt = list(range(60)) * 3
    actual = run(core, *(Request(prompt, GREEDY, id=str(n)) for n in range(5)))
    assert [actual[str(n)].cached_tokens for n in range(5)] == [0, 160, 160, 160, 160]
    assert all(a.token_ids == expected(prompt, 20) for a in actual.values())


def test_the_prefix_cache_includes_answers():
    core = make_core(proposers=None)
    prompt = [3] * 40
    answer = run(core, Request(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), id="a"))["a"]
    turn = [*prompt, *answer.token_ids, 9, 9]
    assert run(core, Request(turn, GREEDY, id="b"))["b"].cached_tokens == 99  # all that were processed: the last was not


def test_nan_logits_fail_only_their_request_and_are_not_cached():
    core = make_core()
    core.runner.broken = {59}
    short = SamplingParams(temperature=0, max_tokens=10)
    actual = run(core, Request([1] * 40 + [59], GREEDY, id="bad"), Request([2] * 40, short, id="good"))
    assert actual["bad"].finish == "error" and "finite" in actual["bad"].error and not actual["bad"].token_ids
    assert actual["good"].token_ids == expected([2] * 40, 10)
    assert run(core, Request([1] * 40, GREEDY, id="again"))["again"].cached_tokens == 0


def test_a_failed_allocation_fails_only_the_step():
    core = make_core()

    def fail():
        core.runner.before = lambda: None
        raise MemoryError("no pages")

    core.runner.before = fail
    core.add(Request([1, 2], GREEDY, id="a"))
    (output,) = core.step()
    assert output.finish == "error" and output.transient
    assert run(core, Request([1, 2], GREEDY, id="b"))["b"].token_ids == expected([1, 2], 20)
    assert blocks_in_use(core) == 0


def test_deadlines_and_cancellation():
    core = make_core()
    endless = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    core.add(Request([1], endless, id="late", deadline=core.clock() + 0.1))
    core.add(Request([2], endless, id="cancelled"))
    core.step()
    core.cancel("cancelled")
    core.cancel("nobody")
    finishes = {}
    while not core.idle:
        finishes |= {o.request_id: o.finish for o in core.step() if o.finish}
    assert finishes == {"late": "deadline", "cancelled": "cancelled"} and blocks_in_use(core) == 0


def test_stop_strings_and_tokens():
    prompt = [5, 6]
    text = expected(prompt, 40, None)
    core = make_core()
    letters = "".join(chr(65 + t) for t in text)
    base = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    stop = letters[6:9]
    cut = run(core, Request(prompt, SamplingParams(**base, stop=(stop,)), id="a"))["a"]
    assert cut.finish == "stop" and cut.stop_reason == stop and cut.text == letters[: letters.index(stop)]
    kept = run(core, Request(prompt, SamplingParams(**base, stop=(stop,), include_stop=True), id="b"))["b"]
    assert kept.text == letters[: letters.index(stop) + 3]
    token = run(core, Request(prompt, SamplingParams(**base, stop_token_ids=(text[4],)), id="c"))["c"]
    assert token.stop_reason == text[4] and token.token_ids == text[: text.index(text[4]) + 1]


def test_log_probabilities_are_of_unprocessed_logits():
    from support.mock_model import logits_of

    core = make_core()
    sampling = SamplingParams(temperature=0.7, seed=3, max_tokens=6, logprobs=3, ignore_eos=True, top_k=5)
    answer = run(core, Request([4, 4], sampling, id="a"))["a"]
    context = [4, 4]
    for token, reported in zip(answer.token_ids, answer.logprobs, strict=True):
        logits = logits_of(context).astype(np.float64)
        right = logits - np.log(np.exp(logits).sum())
        order = sorted(range(VOCAB), key=lambda t: -right[t])[:3]
        assert reported.token == token and reported.logprob == pytest.approx(right[token], abs=1e-5)
        assert [t for t, _ in reported.top] == order
        context.append(token)


@pytest.mark.parametrize("options", [{"step_tokens": 5}, {"step_tokens": 512}])
def test_embeddings_are_the_mean_of_the_states(options):
    core = make_core(**options)
    actual = run(core, Request([1, 2, 3, 10], GREEDY, id="a", embed=True), Request([7] * 50, GREEDY, id="b", embed=True))
    assert actual["a"].embedding == pytest.approx([4.0]) and actual["b"].embedding == pytest.approx([7.0])
    assert actual["a"].finish == "stop" and blocks_in_use(core) == 0


@pytest.mark.parametrize("options", [{"step_tokens": 5}, {"step_tokens": 512}])
def test_logits_of_tokens_after_the_prompt(options):
    core = make_core(**options)
    prompts = {"a": [1, 2, 3] * 30, "b": [1, 2, 3] * 30, "c": [7]}
    for id, prompt in prompts.items():  # the second finds the first's blocks in the prefix cache
        output = run(core, Request(prompt, GREEDY, id=id, scored_tokens=(5, 0)))[id]
        assert output.scores.tolist() == [logits_of(prompt)[5], logits_of(prompt)[0]]
        assert output.finish == "stop" and not output.token_ids and output.cached_tokens == (64 if id == "b" else 0)
    assert blocks_in_use(core) == 0


def test_impossible_requests_are_rejected_before_running():
    core = make_core(blocks=4, context=200)
    assert core.check(Request([1] * 127, SamplingParams(max_tokens=None))) == 1
    for request in (
        Request([]), Request([1, VOCAB]), Request([-1]), Request([1] * 128, SamplingParams(max_tokens=1)),
        Request([1] * 100_000), Request([1], SamplingParams(logit_bias={VOCAB: 1})),
        Request([1], SamplingParams(stop_token_ids=(VOCAB,))), Request([1], GREEDY, scored_tokens=(VOCAB,)),
        Request([1], GREEDY, classify=True), Request([1], embed=True, scored_tokens=(1,)),
    ):  # fmt: skip
        with pytest.raises(RequestError):
            core.check(request)
    with pytest.raises(RequestError, match="whole cache.* is 128 tokens.*, or .*sparse_attention=True"):
        core.check(Request([1] * 128, SamplingParams(max_tokens=1)))
    wide = make_core(blocks=64, context=200)
    assert wide.check(Request([1] * 150, SamplingParams(max_tokens=50))) == 50
    with pytest.raises(RequestError, match="context length is 200"):
        wide.check(Request([1] * 150, SamplingParams(max_tokens=51)))


def test_a_request_ends_if_all_tokens_are_forbidden():
    core = make_core()
    sampling = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(VOCAB), -100))
    answer = run(core, Request([1], sampling, id="a"))["a"]
    assert answer.finish == "stop" and answer.token_ids == [] and "no token" in answer.stop_reason


def test_a_seed_gives_the_same_text_with_drafts_and_in_batches():
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=60, ignore_eos=True)
    request = Request([8, 8, 8, 8], sampling, id="a")
    alone = run(make_core(), request)["a"].token_ids
    assert run(make_core(), request)["a"].token_ids == alone
    script = {n: request.prompt + alone for n in range(1, 9)}
    drafted = make_core(proposers=[(ScriptedProposer(script, 0.7, VOCAB), 4)])
    others = [Request([n], SamplingParams(temperature=1.0, max_tokens=50), id=str(n)) for n in range(4)]
    assert run(drafted, request, *others)["a"].token_ids == alone
    assert drafted.drafting.accepted > 10


def test_duplicate_ids_are_rejected():
    core = make_core()
    core.add(Request([1], GREEDY, id="a"))
    with pytest.raises(RequestError, match="running already"):
        core.add(Request([1], GREEDY, id="a"))


def test_an_engine_reports_each_step_and_ends_remaining_requests():
    engine = Engine(make_core(step_tokens=16))
    requests = [Request([n, *range(40)], SamplingParams(temperature=0, max_tokens=4), id=f"r{n}") for n in range(3)]
    steps = list(engine.steps(requests))
    assert [] in steps[:5]  # steps of prefill only
    texts: dict[str, list[int]] = {request.id: [] for request in requests}
    for output in (output for step in steps for output in step):
        texts[output.request_id] += output.token_ids
    assert texts == {request.id: expected(request.prompt, 4) for request in requests}
    running = engine.steps([Request(list(range(40)), SamplingParams(max_tokens=50), id="left")])
    next(running)
    running.close()
    assert engine.core.idle and blocks_in_use(engine.core) == 0
    assert make_core(blocks=4, context=1000).room == 128 and make_core(blocks=64, context=1000).room == 1000
