"""KL divergence and perplexity against values computed here, and BLEU and chrF against sacrebleu."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from deepseek_optimizer.bench import answer_scores, quality, unoptimized_model
from deepseek_optimizer.errors import ConfigError
from support.quantized_files import SECTIONS, gptq, quantized_copy


def test_two_distributions_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    found = quality.Divergence()
    found.add(q.log(), p.log(), torch.tensor([0, 1]))
    result = found.summary()
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert result["tokens"] == 2
    assert result["kl_mean"] == pytest.approx(kl / 2, rel=1e-5)
    assert result["same_top_percent"] == 50
    assert result["perplexity"] == pytest.approx(2) and result["reference_perplexity"] == pytest.approx(4)
    assert result["perplexity_ratio"] == pytest.approx(0.5)


def test_the_error_of_the_ratio_covers_the_scatter():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(40, 300, 30, generator=generator) * 2
    noisy = reference + 0.3 * torch.randn(40, 300, 30, generator=generator)
    results = []
    for theirs, ours in zip(reference, noisy, strict=True):
        one = quality.Divergence()
        one.add(ours, theirs, torch.multinomial(torch.ones(30), 300, replacement=True, generator=generator))
        results.append(one.summary())
    ratios = torch.tensor([r["perplexity_ratio"] for r in results])
    error = sum(r["perplexity_ratio_error"] for r in results) / len(results)
    assert error == pytest.approx(ratios.std().item(), rel=0.4)


def test_a_model_against_itself(plain_pair, byte_tokenizer):
    model, reference = plain_pair
    texts = quality.stretches(byte_tokenizer, quality.sample_text(), 64, 2)
    assert [t.shape for t in texts] == [(1, 64)] * 2 and not torch.equal(*texts)
    result = quality.compare(model, reference, texts)
    assert result["tokens"] == 128 and result["kl_mean"] == pytest.approx(0, abs=1e-9)
    assert result["same_top_percent"] == 100 and result["perplexity_ratio"] == pytest.approx(1)


@pytest.fixture
def plain_pair(tiny_model):
    return [unoptimized_model.load_unoptimized(tiny_model, torch.float32) for _ in range(2)]


def test_decode_and_prefill_use_the_same_text(either, byte_tokenizer):
    (ids,) = quality.stretches(byte_tokenizer, "A text of some length.", 16, 1)
    at_once, one_by_one = quality.through_prefill(either, ids), quality.through_decode(either, ids)
    torch.testing.assert_close(at_once, one_by_one, atol=1e-4, rtol=1e-3)


def test_int4_is_further_away_than_int8(tiny_model, byte_tokenizer):
    from deepseek_optimizer import load_model

    texts = quality.stretches(byte_tokenizer, quality.sample_text(), 128, 1)
    reference = unoptimized_model.load_unoptimized(tiny_model, torch.float32)
    kl = [quality.compare(load_model(tiny_model, precision=p), reference, texts)["kl_mean"] for p in ("int8", "int4")]
    assert 0 < kl[0] < kl[1] / 10


def test_short_texts(byte_tokenizer):
    assert quality.stretches(byte_tokenizer, "abc", 64, 2)[0].shape == (1, 3)
    with pytest.raises(ValueError, match="two tokens"):
        quality.stretches(byte_tokenizer, "a", 64, 2)


def test_a_packed_model_is_not_a_reference(tiny_model, tmp_path):
    from deepseek_optimizer import load_model

    load_model(tiny_model, precision="int8").save_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match="the original model with --reference"):
        unoptimized_model.load_unoptimized(tmp_path / "packed", torch.float32)


def test_another_quantizers_model_is_no_reference(tiny_model, tmp_path):
    folder, _ = quantized_copy(tiny_model, tmp_path / "m", gptq, SECTIONS["gptq"])
    with pytest.raises(ConfigError, match="is quantized by gptq; give the original model"):
        unoptimized_model.load_unoptimized(folder, torch.float32)


def test_pair_files(tmp_path):
    file = tmp_path / "pairs"
    file.write_text("Guten Tag\tHello\n\n" + json.dumps({"source": "a\tb", "reference": "c"}) + "\n")
    assert answer_scores.read_pairs(file) == [("Guten Tag", "Hello"), ("a\tb", "c")]
    for wrong, line in (("Hello\tHi\nalone\n", "line 2"), ('{"source": "x"}\n', "line 1"), ("\n", "no pairs")):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=line):
            answer_scores.read_pairs(file)


def test_scores_equal_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat today", "there is a dog in the garden"]
    references = ["the cat sat on the mat", "a dog is in the garden"]
    found = answer_scores.score(answers, references)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert answer_scores.score(references, references)["bleu"] == pytest.approx(100)
    assert found["pairs"] == 2 and "version" in found["bleu_signature"]


def test_missing_sacrebleu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match=r"deepseek-optimizer\[bench\]"):
        answer_scores.score(["a"], ["a"])


def test_answers_are_greedy(plain_pair, byte_tokenizer):
    model = plain_pair[0]
    texts = answer_scores.answers(model, byte_tokenizer, [("Hello", ""), ("You", "")], 5)
    assert len(texts) == 2 and texts == answer_scores.answers(model, byte_tokenizer, [("Hello", ""), ("You", "")], 5)
