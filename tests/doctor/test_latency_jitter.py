"""Uneven streams: how each set of figures is read, and each cause provoked in an engine whose time is counted, not measured."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from deepseek_optimizer import load_model, make_engine
from deepseek_optimizer.doctor.symptoms import latency_jitter
from deepseek_optimizer.doctor.symptoms.latency_jitter import Jitter, Pace, gaps, judge, steps_by_streams
from deepseek_optimizer.errors import BackendError

GOOD = Jitter(
    streams=4,
    idle=Pace(0.010, 0.012),
    chunked=Pace(0.020, 0.031),
    whole=Pace(0.012, 0.035),
    prompt_tokens=1024,
    stall=3.0,
    step_tokens=512,
    steps={1: 0.008, 4: 0.010, 16: 0.016, 32: 0.024},
    high=32,
    chosen=32,
    preemptions=0,
    cache_tokens=100_000,
    others=0.0,
)


def judged(**changes):
    return list(judge(Jitter(**{**GOOD.__dict__, **changes})))


def test_an_even_pace(one):
    finding = one(judged(), "ok", "10.0 ms, p99 12.0 ms between tokens, 20.0 ms, p99 31.0 ms while prompts of 1024 tokens")
    assert finding.facts["chunked_p99_ms"] == pytest.approx(31) and finding.facts["step_ms_by_streams"]["16"] == pytest.approx(
        16
    )


def test_unchunked_prompts(one):
    actual = judged(whole=Pace(0.012, 0.400))
    note = one(actual, "note", "processed whole, prompts of 1024 tokens stall the streams: 12.0 ms, p99 400.0 ms")
    assert "512 tokens" in note.cause and "stall=3" in note.fix and "prefill_chunk" in note.fix
    one(actual, "ok", "keep their pace")


def test_chunked_prompts_that_still_stall(one):
    actual = judged(chunked=Pace(0.012, 0.041), whole=Pace(0.012, 0.4))
    finding = one(actual, "warning", "stall the streams though they are processed in chunks")
    assert "stall=3" in finding.cause and "smaller stall" in finding.fix and len(actual) == 1


def test_a_batch_that_is_too_large(one):
    finding = one(
        judged(steps={1: 0.010, 8: 0.030, 16: 0.050, 32: 0.100}), "warning", "with 32 concurrent streams a token takes 100.0 ms"
    )
    assert "batch_size_range, 32" in finding.cause
    assert "batch_size_range=(1, 8): 267 tokens/s in total instead of 320" in finding.fix


def test_a_batch_limited_by_the_engine():
    assert [f.severity for f in judged(steps={1: 0.010, 8: 0.030, 16: 0.050, 32: 0.100}, chosen=8)] == ["ok"]


def test_a_cache_that_is_too_small(one):
    finding = one(judged(preemptions=7, cache_tokens=256), "warning", "preempted 7 times")
    assert "256 tokens" in finding.cause and "kv_cache_memory" in finding.fix and "(1, 16)" in finding.fix


def test_a_cache_too_small_for_the_requests(one):
    finding = one(judged(cache_tokens=10_720), "note", "room for 10 streams of 1072 tokens, but 32 may run concurrently")
    assert "kv_cache_memory" in finding.fix and "(1, 10)" in finding.fix
    assert one(judged(cache_tokens=500, chosen=2), "note", "room for 1 streams")


def test_other_processes(one):
    actual = judged(others=1.3, chunked=Pace(0.02, 0.5))
    one(actual, "warning", "other processes used 1.3 of the CPUs")
    assert one(actual, "warning", "though they are processed in chunks").cause == "other processes (see above)"
    assert judged(others=None)[0].severity == "ok"


def test_jitter_without_a_known_cause(one):
    assert "threads" in one(judged(idle=Pace(0.010, 0.031)), "warning", "uneven though nothing else runs").fix


def test_percentiles():
    assert Pace.of([3.0, 1.0, 2.0]) == Pace(2.0, 3.0)
    assert Pace.of([float(n) for n in range(1, 201)]) == Pace(100.5, 198.0)


@pytest.fixture
def counted(tiny_model):
    """counted(**options) -> the core of an engine whose steps take 10 ms plus 0.5 ms per token plus `each` s per stream."""
    model = load_model(tiny_model)

    def make(each=0.0, **options):
        core = make_engine(model, drafts=False, prefix_cache=False, **options).core
        now, run = [0.0], core.runner.step

        def step(parts, *others, **more):
            now[0] += 0.010 + 0.0005 * sum(len(part.ids) for part in parts) + each * len(parts)
            return run(parts, *others, **more)

        core.runner.step, core.clock = step, lambda: now[0]
        return core

    return make


def test_a_long_prompt_stalls_the_streams_of_an_engine_without_a_limit(counted, one):
    idle = Pace.of(gaps(counted(), nullcontext, 3))
    whole = Pace.of(gaps(counted(stall=None), nullcontext, 3, 100))
    chunked = Pace.of(gaps(counted(stall=3.0), nullcontext, 3, 100))
    assert idle.p50 == idle.p99 == pytest.approx(0.0115)
    assert whole.p99 == pytest.approx(0.0615) and chunked.p99 < 4 * idle.p99 < whole.p99
    one(judged(idle=idle, chunked=chunked, whole=whole), "note", "processed whole, prompts")
    one(judged(idle=idle, chunked=whole, whole=whole), "warning", "stall the streams")


def test_a_large_batch_slows_its_streams(counted, one):
    core = counted(each=0.005, batch_size_range=(1, 16))
    steps = steps_by_streams(core, nullcontext, 16)
    assert set(steps) >= {1, 2, 4, 8, 16} and steps[16] == pytest.approx(0.010 + 16 * 0.0055)
    assert (
        "batch_size_range=(1, 8)" in one(judged(steps=steps, high=16, chosen=16), "warning", "with 16 concurrent streams").fix
    )


def test_a_small_cache_preempts_streams(tiny_model, one, monkeypatch):
    monkeypatch.setattr(latency_jitter, "TOKENS", 100)
    model = load_model(tiny_model, kv_cache_memory=1 << 18)
    core = make_engine(model, drafts=False, prefix_cache=False).core
    assert 4 <= core.blocks < 16  # blocks of 32 tokens: enough for one stream of 116 tokens, too few for four
    actual = gaps(core, nullcontext, 4)
    assert len(actual) == 4 * (latency_jitter.TOKENS - 1) and core.idle
    assert "kv_cache_memory" in one(judged(preemptions=core.metrics.preemptions), "warning", "preempted").fix


def test_a_model_that_cannot_be_run(counted):
    core = counted()

    def broken(*_, **__):
        raise BackendError("no numbers")

    core.runner.step = broken
    for run in (lambda: gaps(core, nullcontext, 2), lambda: steps_by_streams(core, nullcontext, 2)):
        with pytest.raises(BackendError, match="no numbers"):
            run()


@pytest.mark.parametrize("batch", [1, 5])
def test_end_to_end(case, tiny_model, batch):
    actual = list(latency_jitter.measure(case(model=str(tiny_model), batch=batch)))
    assert actual  # which ones depends on other processes of this machine
    facts = actual[0].facts
    assert facts["idle_p50_ms"] > 0 and facts["chunked_p99_ms"] > 0 and facts["high"] == (32 if batch == 1 else 5)
    assert facts["prompt_tokens"] == 256 - 4 * 64 or facts["prompt_tokens"] <= 128
