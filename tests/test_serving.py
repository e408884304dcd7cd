"""Engines over real plans: a request's tokens and log probabilities do not depend on other requests in the batch.

By default as long as none of it is recomputed; with `batch_invariant=True` bit for bit, even if requests are chunked, share
blocks, are cancelled, preempted or drafted.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import (
    ConfigError,
    Request,
    SamplingParams,
    UnsupportedRequestError,
    load_model,
    make_engine,
)
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.errors import ContextLengthError
from support.family_configs import llama, rope
from support.models import CASES, random_ids, random_model

native = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")
# Trained for 64 tokens, with a context of 512: most texts here are longer, each with its own frequencies.
CONFIGS = {**CASES, "llama-beyond": lambda: llama(max_position_embeddings=64, **rope("dynamic", factor=8.0))}
FAMILIES = [
    "llama-gqa", "llama-beyond", "qwen2-windows", "qwen3-gqa", "deepseek_v2-groups", "deepseek_v3-groups",
    "deepseek_v32-indexer", "youtu-tied", "mistral4-groups", "glm_moe_dsa-shared", "llama4_text-chunks", "gemma4_text-shared",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Case -> a saved model."""
    made = {}

    def folder(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp("serving") / case
            random_model(CONFIGS[case]()).save_pretrained(made[case])
        return made[case]

    return folder


def requests(case, count, seed, max_tokens=40):
    """Sampled and greedy requests, some with common prefixes."""
    rng, result = random.Random(seed), []
    shared = [random_ids(CONFIGS[case](), 70, seed=n) for n in range(3)]
    for n in range(count):
        prompt = random_ids(CONFIGS[case](), rng.randrange(1, 130), seed=100 + n)
        if rng.random() < 0.5:
            prompt = rng.choice(shared) + prompt[:20]
        fields = {"temperature": 0.0} if rng.random() < 0.5 else {"temperature": 0.8, "top_p": 0.9, "seed": n}
        sampling = SamplingParams(
            max_tokens=rng.randrange(max_tokens // 2, max_tokens), logprobs=2, ignore_eos=rng.random() < 0.7, **fields
        )
        result.append(Request(prompt, sampling, id=str(n), priority=rng.randrange(2)))
    return result


def alone(engine, wanted):
    return {r.id: engine.generate([r])[0] for r in wanted}


def in_company(engine, wanted, seed, cancel=0.0, preempt=0.0):
    """Runs requests that arrive, are cancelled and preempted at random.

    Returns: id -> (token ids, logprobs) of those that finished."""
    rng, core, waiting = random.Random(seed), engine.core, list(wanted)
    result, texts = {}, {r.id: ([], []) for r in wanted}
    while waiting or not core.idle:
        for _ in range(rng.randrange(5)):
            if waiting:
                core.add(waiting.pop(rng.randrange(len(waiting))))
        if rng.random() < cancel:
            core.cancel(rng.choice(wanted).id)
        if rng.random() < preempt and core.scheduler.running:
            victim = rng.choice(core.scheduler.running)
            core.scheduler.preempt(victim)
            if core.drafting:
                core.drafting.forget(victim, ended=False)
        for output in core.step():
            tokens, logprobs = texts[output.request_id]
            tokens += output.token_ids
            logprobs += output.logprobs or []
            if output.finish in ("stop", "length"):
                result[output.request_id] = texts[output.request_id]
            else:
                assert output.finish in (None, "cancelled"), output.error
    return result


def check_equal(answers, result):
    for name, (tokens, logprobs) in result.items():
        assert tokens == answers[name].token_ids
        assert logprobs == answers[name].logprobs  # bitwise equal floats


@native
@pytest.mark.parametrize("precision", ["bf16", "int4"])
@pytest.mark.parametrize("case", FAMILIES)
def test_a_request_in_a_batch_equals_one_alone(folders, case, precision):
    model = load_model(folders(case), precision=precision)
    wanted = requests(case, 24, seed=1)
    answers = alone(make_engine(model, prefix_cache=False, drafts=False), wanted)
    for seed, options in enumerate([{}, {"stall": 2.0, "step_tokens": 96}, {"drafts": True, "batch_size_range": (1, 9)}]):
        engine = make_engine(model, prefix_cache=False, **options)
        actual = in_company(engine, wanted, seed)
        assert len(actual) == len(wanted)
        check_equal(answers, actual)


FORMATS = ["fp32", "bf16", "fp8", "int8", "int4", "q4_1"]


@native
@pytest.mark.parametrize(
    "case,precision",
    [(c, p) for c in FAMILIES for p in (FORMATS if c in ("llama-gqa", "deepseek_v3-groups") else FORMATS[::4])],
)
def test_batch_invariance_is_bitwise(folders, case, precision):
    """32 other requests, a small cache, chunked prompts, shared prefixes, requests cancelled, preempted and drafted."""
    fields = {"precision": precision, "batch_invariant": True}
    model = load_model(folders(case), **fields)
    wanted = requests(case, 33, seed=2, max_tokens=160)
    answers = alone(make_engine(model, prefix_cache=False, drafts=False), wanted)
    blocks = 20 * model.dso.graph.cache.groups
    block_bytes = model.dso.backend.block_bytes(model.dso.graph, model.dso.kv_dtype)
    little = load_model(folders(case), **fields, kv_cache_memory=max(1 << 16, blocks * block_bytes))
    engine = make_engine(little, step_tokens=50, stall=3.0)
    ended = {}
    for seed in range(2):
        actual = in_company(engine, wanted, seed, cancel=0.03, preempt=0.1)
        check_equal(answers, actual)
        ended |= actual
    assert len(ended) > 15 and engine.core.scheduler.preemptions > 0
    if case != "llama-beyond":  # its texts rarely have the same frequencies
        assert engine.core.prefix is not None and engine.core.metrics.cached_tokens > 0


@native
@pytest.mark.parametrize("case", ["llama-gqa", "qwen3-gqa"])
def test_preempted_requests_continue_by_default(folders, case):
    """Recomputed tokens use the phase in which they were first computed, so that nothing changes here either."""
    model = load_model(folders(case), precision="bf16")
    wanted = requests(case, 20, seed=3, max_tokens=150)
    answers = alone(make_engine(model, prefix_cache=False, drafts=False), wanted)
    block_bytes = model.dso.backend.block_bytes(model.dso.graph, model.dso.kv_dtype)
    little = load_model(folders(case), precision="bf16", kv_cache_memory=20 * block_bytes)
    engine = make_engine(little, prefix_cache=False, drafts=False)
    actual = in_company(engine, wanted, 0, preempt=0.1)
    assert engine.core.scheduler.preemptions > 5
    check_equal(answers, actual)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=native)])
@pytest.mark.parametrize("case", ["llama-gqa", "qwen2-windows", "deepseek_v3-groups"])
def test_log_probabilities_of_prompts_equal_the_model(folders, case, backend):
    """In chunks and in a batch, within 1e-4 of Transformers."""
    engine = make_engine(load_model(folders(case), backend=backend, precision="fp32"), step_tokens=70)
    plain = AutoModelForCausalLM.from_pretrained(folders(case), dtype=torch.float32)
    prompts = [random_ids(CONFIGS[case](), count, seed=count) for count in (2, 33, 64, 150)]
    sampling = SamplingParams(max_tokens=0)
    answers = engine.generate([Request(ids, sampling, id=str(n), prompt_logprobs=3) for n, ids in enumerate(prompts)])
    for ids, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            right = torch.log_softmax(plain(torch.tensor([ids])).logits[0, :-1].double(), -1)
        actual = answer.prompt_logprobs
        own = right.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(actual.logprobs), own, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.from_numpy(actual.top_logprobs), right.topk(3).values, atol=1e-4, rtol=0)


@native
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v3-groups", "qwen3-gqa"])
def test_log_probabilities_of_prompts_change_nothing_else(folders, case, precision):
    """The texts' log probabilities have the same bits; with `batch_invariant`, those of prompts too, in any batch."""
    wanted = requests(case, 12, seed=5)
    scored = [replace(request, prompt_logprobs=1) for request in wanted]
    model = load_model(folders(case), precision=precision)
    engine = make_engine(model, prefix_cache=False, drafts=False)
    check_equal(alone(engine, wanted), {n: (a.token_ids, a.logprobs) for n, a in alone(engine, scored).items()})
    invariant = load_model(folders(case), precision=precision, batch_invariant=True)
    engine = make_engine(invariant, step_tokens=50)
    of_alone = alone(engine, scored)
    for own, answer in zip(scored, engine.generate(scored), strict=True):
        assert (answer.prompt_logprobs.logprobs == of_alone[own.id].prompt_logprobs.logprobs).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=native)])
@pytest.mark.parametrize("case", ["llama-tied", "deepseek_v3-direct"])
def test_greedy_text_equals_generate(folders, case, backend):
    model = load_model(folders(case), backend=backend, precision="fp32")
    engine = make_engine(model)
    for seed in range(3):
        ids = random_ids(CASES[case](), 50, seed=seed)
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, 50:].tolist()
        assert engine.generate([ids], SamplingParams(temperature=0, max_tokens=30))[0].token_ids == wanted


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=native)])
def test_embeddings_are_the_mean_of_the_last_hidden_states(folders, backend):
    model = load_model(folders("llama-gqa"), backend=backend, precision="fp32")
    ids = [random_ids(CASES["llama-gqa"](), n, seed=n) for n in (1, 40, 200)]
    engine = make_engine(model, step_tokens=64)
    for own, answer in zip(ids, engine.generate([Request(i, embed=True) for i in ids]), strict=True):
        hidden = model(torch.tensor([own]), output_hidden_states=True).hidden_states[-1][0]
        assert torch.allclose(torch.from_numpy(answer.embedding), hidden.mean(0), atol=1e-5)


@pytest.fixture(scope="module")
def beyond(folders):
    """Trained for 64 tokens, with a context of 512."""
    return load_model(folders("llama-beyond"), precision="fp32", backend="reference")


def test_texts_beyond_the_trained_length_equal_generate(beyond):
    engine = make_engine(beyond, step_tokens=29)
    prompts = [random_ids(beyond.config, n, seed=n) for n in (40, 60, 100, 10)]
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    more = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    wanted = [beyond.generate(torch.tensor([p]), **more)[0].tolist() for p in prompts]
    actual = engine.generate(prompts, sampling)
    assert [p + a.token_ids for p, a in zip(prompts, actual, strict=True)] == wanted


def test_blocks_rotated_with_other_frequencies_are_not_shared(beyond):
    engine, prompt = make_engine(beyond, drafts=False), random_ids(beyond.config, 100)
    cached = []
    for tokens in (10, 10, 11, 10, 11):
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        cached.append(engine.generate([prompt], sampling)[0].cached_tokens)
    assert cached == [0, 96, 0, 96, 96]
    short, cached = prompt[:40], []
    for tokens in (5, 24, 25):  # up to 64 tokens have the original frequencies
        cached.append(engine.generate([short], SamplingParams(max_tokens=tokens, ignore_eos=True))[0].cached_tokens)
    assert cached == [0, 32, 0]


def test_the_context_of_an_engine_includes_its_extension(beyond):
    engine, prompt = make_engine(beyond), random_ids(beyond.config, 500)
    assert len(engine.generate([prompt], SamplingParams(max_tokens=None, ignore_eos=True))[0].token_ids) == 12
    with pytest.raises(ContextLengthError, match="do not fit: this model's maximum context length is 512"):
        engine.generate([prompt], SamplingParams(max_tokens=13))


def test_a_window_stays_within_the_trained_length(tmp_path):
    """There the frequencies are the original ones, whatever was dropped."""
    random_model(llama(max_position_embeddings=128, **rope("dynamic", factor=8.0))).save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m", precision="fp32", backend="reference")
    engine = make_engine(model, cache_window=400)
    assert engine.core.sliding.window == 128
    sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    answer = engine.generate([random_ids(model.config, 150)], sampling)[0]
    assert len(answer.token_ids) == 200 and answer.dropped_tokens >= 350 - 128


@native
def test_a_draft_model_drafts_beyond_the_trained_length(folders, beyond):
    model = load_model(folders("llama-beyond"), precision="fp32")
    prompt, sampling = random_ids(model.config, 100), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    engine = make_engine(model, draft_model=load_model(folders("llama-beyond"), precision="fp32"))
    engine.core.drafting._proposers.pop(0)
    assert engine.generate([prompt], sampling)[0].token_ids == make_engine(beyond).generate([prompt], sampling)[0].token_ids
    assert engine.core.drafting.accepted > 0 and engine.core.drafting.accepted >= 0.9 * engine.core.drafting.proposed


@native
def test_a_draft_model_drafts(folders):
    """The model as its own draft model: nearly every draft is accepted."""
    model, twin = (load_model(folders("llama-gqa"), precision="fp32") for _ in range(2))
    ids = random_ids(CASES["llama-gqa"](), 30)
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    plain = make_engine(model, drafts=False).generate([ids, ids[:7]], sampling)
    engine = make_engine(model, draft_model=twin)
    engine.core.drafting._proposers.pop(0)  # prompt lookup would be tried first
    actual = engine.generate([ids, ids[:7]], sampling)
    assert [a.token_ids for a in actual] == [a.token_ids for a in plain]
    assert engine.core.drafting.accepted > 0 and engine.core.drafting.accepted >= 0.9 * engine.core.drafting.proposed
    small = load_model(folders("qwen3-gqa"))
    other = load_model(_other_vocabulary(folders))
    with pytest.raises(ConfigError, match="vocabulary"):
        make_engine(small, draft_model=other)


def _other_vocabulary(folders):
    folder = folders("llama-gqa").parent / "other"
    random_model(CASES["llama-gqa"]().__class__(**{**CASES["llama-gqa"]().to_dict(), "vocab_size": 50})).save_pretrained(folder)
    return folder


@native
def test_mtp_layers_draft(folders):
    from support.tiny_v3 import documents, tiny_v3

    model = load_model(tiny_v3(), precision="bf16", batch_invariant=True)  # near ties must not depend on the size of a step
    prompts = documents(tiny_v3(), 3, 60)
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    plain = make_engine(model, drafts=False, prefix_cache=False).generate(prompts, sampling)
    engine = make_engine(model)
    engine.core.drafting._proposers.pop(0)
    for _ in range(2):  # the second time after cached prefixes, for which the layers have no states
        assert [a.token_ids for a in engine.generate(prompts, sampling)] == [a.token_ids for a in plain]
    assert engine.core.drafting.accepted > 0


@native
@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v2-groups", "deepseek_v3-groups"])
def test_an_endless_conversation_in_a_window(folders, case):
    """Twenty windows long; the same text in any batch, since other requests do not shrink the window."""
    model = load_model(folders(case), precision="bf16")
    ids = random_ids(CASES[case](), 900)
    sampling = SamplingParams(temperature=0, max_tokens=4_000, ignore_eos=True)
    request = Request(ids, sampling, pinned=((200, 260),))
    engine = make_engine(model, cache_window=256, prefix_cache=False)
    max_blocks, output, manager = 0, None, engine.core.memory.manager
    for output in engine.stream(request):  # noqa: B007  the last one is looked at
        max_blocks = max(max_blocks, manager.num_blocks - manager.free_blocks)
    assert max_blocks <= 8 and output.finish == "length" and output.completion_tokens == 4_000
    assert output.dropped_tokens >= 900 + 4_000 - 256
    with pytest.raises(ConfigError, match="window"):
        make_engine(model, cache_window=256, batch_invariant=True)


def test_invalid_options(folders):
    model = load_model(folders("llama-tied"), backend="reference")
    with pytest.raises(ConfigError, match="no option 'batch_size'"):
        make_engine(model, batch_size=3)
    with pytest.raises(ConfigError, match="batch_invariant"):
        make_engine(model, batch_invariant=True)
    with pytest.raises(ConfigError, match="load_model"):
        make_engine(random_model(CASES["llama-tied"]()))
    handle = model.model.layers[0].register_forward_hook(lambda *a: None)
    with pytest.raises(UnsupportedRequestError, match="hooks"):
        make_engine(model)
    handle.remove()


@native
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_log_probabilities_of_several_steps_a_call(folders, temperature):
    """They are those of single steps, and most steps are run in calls."""
    model, made, calls = load_model(folders("llama-gqa"), backend="cpu"), [], []
    for decodes in (False, True):
        with make_engine(model, drafts=False, prefix_cache=False) as engine:
            runner = engine.core.runner
            runner.decodes, decode = decodes, runner.decode

            def counted(*args, decode=decode, **options):
                calls.append(decode(*args, **options))
                return calls[-1]

            runner.decode = counted
            sampling = SamplingParams(max_tokens=70, temperature=temperature, seed=3, logprobs=3, ignore_eos=True)
            prompts = [random_ids(CONFIGS["llama-gqa"](), n, seed=n) for n in (5, 40)]
            made.append(engine.generate([Request(ids, sampling) for ids in prompts]))
    assert [(c.token_ids, c.logprobs) for c in made[0]] == [(c.token_ids, c.logprobs) for c in made[1]]
    assert all(len(c.logprobs) == 70 for c in made[1]) and len(calls) < sum(call.steps for call in calls) / 3
