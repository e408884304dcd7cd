"""Timed runs of `generate`: number of tokens, length of the context, and the model is unchanged afterwards."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.bench import runs
from deepseek_optimizer.bench.measure import measure
from deepseek_optimizer.bench.work import Work


@pytest.mark.parametrize("work", [Work(12, 5), Work(12, 5, depth=20), Work(7, 4, depth=9, batch=3), Work(9, 1)])
def test_lengths_are_exact(either, work):
    actual = list(runs.repeated(either, work, repeats=2))
    assert len(actual) == 2
    for run in actual:
        assert (run.prompt, run.batch, len(run.times), run.generated) == (
            work.prompt,
            work.batch,
            work.new,
            work.new * work.batch,
        )
        assert list(run.times) == sorted(run.times) and run.times[0] > 0


def test_what_is_called_beside_the_steps_does_not_count(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])

    def beside():
        clock[0] += 100

    times = runs.TokenTimes(beside)
    times.put("the prompt")
    for _ in range(9):
        clock[0] += 1
        times.put("a token")
    assert times.times == [1, 2, 3, 4, 5, 6, 7, 8, 9] and clock[0] == 209


def test_only_counted_runs_are_interrupted(either):
    calls = []
    assert len(list(runs.repeated(either, Work(3, 9), repeats=2, warmup=3, beside=lambda: calls.append(1)))) == 2
    assert len(calls) == 2 * 2


def test_end_tokens_are_ignored_and_restored(either, monkeypatch):
    ids = torch.tensor([[5, 6, 7]])
    chosen = either.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item()
    either.generation_config.eos_token_id = chosen  # would end every answer to these ids immediately
    monkeypatch.setattr(runs, "random_ids", lambda *_: ids)
    (run,) = runs.repeated(either, Work(3, 6), repeats=1, warmup=0)
    assert run.generated == 6
    assert either.generation_config.eos_token_id == chosen


def test_depth_fills_the_cache_before_the_prompt(either, monkeypatch):
    """Every run computes only its own prompt, after the same cached tokens, as the inputs of `forward` show."""
    lengths = []
    original = either.generate

    def spy(ids, **options):
        cache = next(v for v in options.values() if hasattr(v, "get_seq_length"))
        lengths.append((ids.shape[1], cache.get_seq_length()))
        return original(ids, **options)

    monkeypatch.setattr(either, "generate", spy)
    list(runs.repeated(either, Work(6, 4, depth=11), repeats=2, warmup=1))
    assert lengths == [(17, 11)] * 3


def test_prompts_differ_from_run_to_run_and_repeat_with_the_seed(plain, monkeypatch):
    seen = []
    original = plain.generate
    monkeypatch.setattr(plain, "generate", lambda ids, **o: seen.append(ids.tolist()) or original(ids, **o))
    for _ in range(2):
        list(runs.repeated(plain, Work(8, 1), repeats=2, warmup=0, seed=3))
    assert seen[0] != seen[1] and seen[:2] == seen[2:]


def test_work_beyond_the_context_is_an_error(either):
    with pytest.raises(ValueError, match="context of 300 tokens, but the model has 256"):
        list(runs.repeated(either, Work(200, 50, depth=50), repeats=1))


def test_measure(optimized):
    notes = []
    works = [Work(8, 4), Work(8, 1, batch=2)]
    entries = measure(optimized, works, repeats=2, price_per_hour=3.6, note=notes.append)
    assert [e["work"]["batch"] for e in entries] == [1, 2] and len(notes) == 2
    first = entries[0]
    assert len(first["figures"]["ttft_ms"]["samples"]) == 2 and len(first["figures"]["itl_ms"]["samples"]) == 6
    speeds = [first["figures"][name]["p50"] for name in ("prefill_tok_s", "decode_tok_s")]
    assert [first["cost"][name] for name in ("in", "out")] == pytest.approx([1000 / speed for speed in speeds])
    assert first["cost"]["blended"] == pytest.approx((8 * first["cost"]["in"] + 4 * first["cost"]["out"]) / 12)
    assert list(entries[1]["cost"]) == ["in"]
    assert "decode_tok_s" not in entries[1]["figures"] and first["limits"] is None
