"""Tokens for filling in the middle, by the names that families give them."""

from __future__ import annotations

import copy

import pytest

from deepseek_optimizer.server.tokens.fill_in import fill_in_tokens


@pytest.mark.parametrize(
    "names,expected",
    [
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], "<|fim_prefix|>A<|fim_suffix|>B<|fim_middle|>C"),
        (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], "<｜fim▁begin｜>A<｜fim▁hole｜>B<｜fim▁end｜>C"),
        (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], "<fim_prefix>A<fim_suffix>B<fim_middle>C"),
        (["▁<PRE>", "▁<SUF>", "▁<MID>"], "▁<PRE>A▁<SUF>B▁<MID>C"),
        (["[PREFIX]", "[SUFFIX]"], "[SUFFIX]B[PREFIX]AC"),
    ],
)
def test_families(byte_tokenizer, names, expected):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(names)
    tokens = fill_in_tokens(tokenizer)
    a, b, c = (tokenizer(text)["input_ids"] for text in "ABC")
    assert tokenizer.decode(tokens.ids(a, b, c)) == expected
    assert set(tokens.stops) == {tokenizer.convert_tokens_to_ids(name) for name in names}


@pytest.mark.parametrize(
    "names", [[], ["<|fim_prefix|>", "<|fim_suffix|>"], ["<fim_prefix>", "<|fim_suffix|>", "<fim_middle>"]]
)
def test_models_without_them(byte_tokenizer, names):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(names)
    assert fill_in_tokens(tokenizer) is None
