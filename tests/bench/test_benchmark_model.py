"""`benchmark_model` on prompts of every kind."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import benchmark_model

CASES = ["Hello", [{"role": "user", "content": "Hello"}], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]])]


def test_every_kind_of_case(either, byte_tokenizer):
    result = benchmark_model(either, byte_tokenizer, CASES, max_new_tokens=6, repeats=2)
    assert 0 < result["p50"] <= result["p90"] and result["n"] == 8 and result["p95"] is None and result["p99"] is None
    lengths = [case["prompt_tokens"] for case in result["cases"]]
    assert lengths[0] == lengths[1] > 3 and lengths[2:] == [3, 3]
    assert all(len(case["e2e_ms"]) == 2 for case in result["cases"])
    times = sum(sum(case["e2e_ms"]) for case in result["cases"]) / 1e3
    generated = 2 * sum(case["new_tokens"] for case in result["cases"])
    assert result["throughput"] == pytest.approx(generated / times)
    assert result["requests_s"] == pytest.approx(8 / times)
    assert result["memory_bytes"] is None or result["memory_bytes"] > 10**7


def test_answers_equal_generate_and_may_end_early(plain, byte_tokenizer):
    ids = torch.tensor([[5, 6, 7]])
    expected = plain.generate(ids, max_new_tokens=6, do_sample=False)[0, 3:]
    result = benchmark_model(plain, byte_tokenizer, [ids], max_new_tokens=6, repeats=1)
    assert result["cases"][0]["text"] == byte_tokenizer.decode(expected, skip_special_tokens=True)
    plain.generation_config.eos_token_id = expected[0].item()
    assert benchmark_model(plain, byte_tokenizer, [ids], repeats=1)["cases"][0]["new_tokens"] == 1


def test_an_answer_ends_with_the_context(either, byte_tokenizer):
    either.generation_config.eos_token_id = None
    result = benchmark_model(either, byte_tokenizer, [torch.arange(10, 260) % 200], max_new_tokens=100, repeats=1, warmup=0)
    assert result["cases"][0]["new_tokens"] == 6


@pytest.mark.parametrize(
    "cases, message",
    [
        ([], "at least one"),
        ("Hello", "a list of prompts"),
        ([torch.arange(256) % 200], "no room"),
        ([torch.zeros(2, 3, dtype=torch.int64)], "one prompt"),
        ([torch.zeros(0, dtype=torch.int64)], "at least one token"),
    ],
)
def test_invalid_cases_are_errors(plain, byte_tokenizer, cases, message):
    with pytest.raises(ValueError, match=message):
        benchmark_model(plain, byte_tokenizer, cases)


def test_repeats(plain, byte_tokenizer):
    with pytest.raises(ValueError, match="repeats"):
        benchmark_model(plain, byte_tokenizer, ["Hello"], repeats=0)
