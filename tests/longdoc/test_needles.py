"""The generator's single needle through `retrieve`: for any reply of the model, the passage with the answer is in the prompt
and cited."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from deepseek_optimizer.bench.long.generate import make_sample
from deepseek_optimizer.longdoc.strategies.retrieve import retrieve
from deepseek_optimizer.longdoc.tasks import Question
from support.long_documents import Scripted, material
from support.tiny_v3 import tiny_v3


def _cited(tokenizer, tokens: int, seed: int, max_length: int) -> bool:
    """Whether the passage with the answer was in the prompt and is among the citations."""
    sample = make_sample("single", tokenizer, tokens, seed=seed)
    _, text, rest = sample.prompt.split("\n\n")
    question = rest.removesuffix("\nAnswer:")
    given = material(text, tokenizer, max_length=max_length, stride=max_length // 4, room=8 * max_length)
    model = Scripted(tokenizer, lambda _: "Nothing of the kind.")
    result = model.run(retrieve(Question(question), given, "asked for"))
    assert all(text[c.start : c.end] == c.text for c in result.citations)
    return sample.answers[0] in model.prompts[0] and any(sample.answers[0] in c.text for c in result.citations)


@pytest.mark.parametrize("tokens", [8192, 65_536])
def test_the_passage_with_the_answer_is_cited(byte_tokenizer, tokens):
    assert all(_cited(byte_tokenizer, tokens, seed, max_length=1024) for seed in range(3))


@pytest.mark.slow
def test_the_passage_with_the_answer_is_cited_at_128k():
    tokenizer = AutoTokenizer.from_pretrained(tiny_v3())
    actual = [_cited(tokenizer, 131_072, seed, max_length=4096) for seed in range(100)]
    assert sum(actual) >= 99
