"""Chunks concatenate to the decoded whole; incomplete characters and partial stop strings are never emitted."""

import random

import pytest

from deepseek_optimizer.engine.detokenizer import Detokenizer


class Bytes:
    """One token per byte; 256 is special."""

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


TEXTS = [
    "plain words",
    "crème brûlée",
    "an emoji 😀🎉 and 👩‍👩‍👧 more",
    "中文字符。",
    "a\ufffdb",
    "e" + "\u0301" * 50,
    "",
    "\x00\ufeff\u202ex",
]


def pieces(text, stop=(), **options):
    d = Detokenizer(Bytes(), stop, **options)
    result = []
    for token in text.encode():
        piece, stopped = d.add(token)
        result.append(piece)
        if stopped is not None:
            return result, stopped
    return [*result, d.end()], None


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_concatenate_to_the_text(text):
    actual, stopped = pieces(text)
    assert "".join(actual) == text and stopped is None
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in actual)


@pytest.mark.parametrize("count", range(1, 6))
def test_an_incomplete_character_at_the_end_is_dropped(count):
    d = Detokenizer(Bytes())
    actual = [d.add(t)[0] for t in "a😀".encode()[:count]] + [d.end()]
    assert "".join(actual) == ("a" if count < 5 else "a😀")


def test_invalid_utf8_is_replaced():
    d = Detokenizer(Bytes())
    assert "".join([d.add(0x80)[0] for _ in range(40)] + [d.end()]) == "\ufffd" * 40  # and is not held back forever


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_against_a_search_in_the_whole_text(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("abc😀") for _ in range(60))
    stops = tuple("".join(rng.choice("abc😀") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4)))
    for include in (False, True):
        actual, stopped = pieces(text, stops, include_stop=include)
        ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
        if not ends:
            assert "".join(actual) == text and stopped is None
            continue
        end, begin, _ = min(ends)  # the first complete one
        whole = "".join(actual)
        assert stopped in stops and whole == (text[:end] if include else text[: end - len(stopped)])


def test_partial_stop_strings_are_never_emitted():
    actual, stopped = pieces("hello STOP world", ("STOP",))
    assert "".join(actual) == "hello " and stopped == "STOP"
    d = Detokenizer(Bytes(), ("STOP",))
    shown = "".join(d.add(t)[0] for t in b"hello STO")
    assert shown == "hello " and d.end() == "STO"


def test_no_stop_before_min_tokens():
    d = Detokenizer(Bytes(), ("b",))
    assert [d.add(t, stops=False) for t in b"ab"] == [("a", None), ("b", None)]
    assert d.add(ord("b")) == ("", "b")


def test_special_tokens_are_skipped_with_smollm_tokenizers(tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = tokenizer("so 😀<|end|> on", add_special_tokens=False)["input_ids"]
    for skip, text in ((True, "so 😀 on"), (False, "so 😀<|end|> on")):
        d = Detokenizer(tokenizer, skip_special_tokens=skip)
        assert "".join([d.add(t)[0] for t in ids] + [d.end()]) == text
