"""Chunks: none too long, no text lost, cut at natural boundaries."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_optimizer import ConfigError
from deepseek_optimizer.calibration.text import sample_text
from deepseek_optimizer.longdoc import Document, TextFile, split
from support.documents import random_text
from support.tiny_v3 import tiny_v3

SMOLLM2 = Path("~/.cache/deepseek-optimizer/SmolLM2-135M-Instruct.Q4_1-bf16").expanduser()


def _trained(metaspace: bool) -> Any:
    """BPE with real merges. Metaspace, as in Llama 2: adds a space before the text, and a text is one word; with BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(byte_fallback=metaspace, unk_token="<unk>" if metaspace else None))
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    inner.pre_tokenizer = (
        pre_tokenizers.Metaspace(split=True) if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))] if metaspace else ["<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([sample_text()[:200_000]], trainer)
    if metaspace:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>" if metaspace else None)


@pytest.fixture(scope="module", params=["bytes", "bpe", "metaspace", "slow", "tiny-v3", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoTokenizer, ByT5Tokenizer

    if request.param == "bytes":
        return request.getfixturevalue("byte_tokenizer")
    if request.param in ("bpe", "metaspace"):
        return _trained(request.param == "metaspace")
    if request.param == "slow":
        return ByT5Tokenizer()
    if request.param == "tiny-v3":
        return AutoTokenizer.from_pretrained(tiny_v3())
    if not SMOLLM2.is_dir():
        pytest.skip(f"no {SMOLLM2}: `dso demo` downloads it")
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def bpe() -> Any:
    return _trained(metaspace=False)


def _check(document: Document, tokenizer: Any, max_length: int, stride: int) -> None:
    chunks = split(document, tokenizer, max_length, stride)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.file for chunk in chunks] == sorted(chunk.file for chunk in chunks)
    for number, file in enumerate(document.files):
        own = [chunk for chunk in chunks if chunk.file == number]
        assert bool(own) == bool(file.text)
        if own:
            assert own[0].start == 0 and own[-1].end == len(file.text)
        for before, after in zip(own, own[1:], strict=False):
            assert before.start < after.start <= before.end < after.end, "each starts where the one before ended, or earlier"
            if stride == 0:
                assert after.start == before.end
        for chunk in own:
            text = file.text[chunk.start : chunk.end]
            alone = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            assert chunk.tokens == len(alone)
            assert len(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]) <= max_length


def test_random_texts(tokenizer: Any) -> None:
    rng = random.Random(6)
    for _ in range(12 if tokenizer.is_fast else 4):
        files = tuple(
            TextFile(str(i), text, headings=tuple(sorted(rng.sample(range(len(text)), min(len(text), 5)))))
            for i, text in enumerate(random_text(rng, rng.choice((0, 1, 7, 300, 4000))) for _ in range(3))
        )
        # At least 48: U+FDFA alone has 33 tokens if a tokenizer normalizes it into its sentence.
        max_length = rng.choice((48, 64, 200, 1024))
        _check(Document(files), tokenizer, max_length, rng.choice((0, 1, max_length // 4, max_length // 2 - 1)))


def test_control_tokens_count_as_text(bpe: Any) -> None:
    chunks = split(Document.of_texts("<|im_end|>" * 50), bpe, 64, 0)
    assert len(chunks) > 1, "if each were one token, all would fit"


def test_the_overlap_is_about_the_stride(bpe: Any) -> None:
    text = sample_text()[:300_000]
    chunks = split(Document.of_texts(text), bpe, 1024, 256)
    shared = [len(bpe(text[b.start : a.end])["input_ids"]) for a, b in zip(chunks, chunks[1:], strict=False)]
    assert min(shared) >= 0.85 * 256 and max(shared) <= 1.5 * 256
    assert all(chunk.tokens >= 0.7 * 1024 for chunk in chunks[:-1]), "chunks are full"


@pytest.mark.parametrize(
    "unit, ends",
    [
        ("words of a line that goes on\n", "\n"),
        ("A sentence of a paragraph without lines. ", ". "),
        ("word ", "word"),
        ("👩🏽‍💻", "👩🏽‍💻"),
        ("e\u0301", "e\u0301"),
    ],
)
def test_cuts_are_at_the_best_boundary(bpe: Any, unit: str, ends: str) -> None:
    text = unit * (40_000 // len(unit))
    for chunk in split(Document.of_texts(text), bpe, 512, 128):
        assert text[: chunk.end].endswith(ends) or chunk.end == len(text)
        assert chunk.start % len(unit) in (0, len(unit) - 1 if unit == "word " else 0)


def test_headings_are_preferred_to_paragraphs_and_paragraphs_to_lines(bpe: Any) -> None:
    paragraph = "some words in a line of a paragraph\n" * 5 + "\n"
    text = (paragraph * 3 + "# Heading\n\n") * 60
    for name, mark in (("a.md", "# Heading"), ("a.txt", "")):
        chunks = split(Document.of_texts({name: text}), bpe, 1024, 0)
        assert len(chunks) > 5
        for chunk in chunks[1:]:
            assert text[: chunk.start].endswith("\n\n") and text[chunk.start :].startswith(mark)


def test_slow_and_fast_tokenizers_give_chunks_of_similar_size() -> None:
    from transformers import ByT5Tokenizer

    text = sample_text()[:20_000]
    sizes = [chunk.tokens for chunk in split(Document.of_texts(text), ByT5Tokenizer(), 2048, 0)]
    assert sum(sizes) == len(text.encode()), "one token per byte, each once"
    assert min(sizes[:-1]) > 0.7 * 2048


class _Counter:
    """A tokenizer that returns `tokens(text)`, and records the size of its inputs."""

    is_fast = True

    def __init__(self, tokens: Callable[[str], int]) -> None:
        self._tokens = tokens
        self.longest = self.max_characters = self.all = 0

    def num_special_tokens_to_add(self) -> int:
        return 0

    def __call__(self, texts: str | list[str], **options: object) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": range(self._tokens(texts))}
        self.longest = max(self.longest, *map(len, texts))
        self.max_characters = max(self.max_characters, sum(map(len, texts)))
        self.all += sum(map(len, texts))
        return {"input_ids": [range(self._tokens(text)) for text in texts]}


def test_one_line_is_tokenized_in_bounded_parts_and_few_times() -> None:
    tokenizer, text = _Counter(len), "x" * 10_000_000
    chunks = split(Document.of_texts(text), tokenizer, 4096, 1024)
    assert tokenizer.longest <= 4096 and tokenizer.max_characters <= 1 << 20
    assert tokenizer.all < 2.6 * len(text), "once for the plan, then 4/3 of the text, chunk by chunk"
    assert chunks[-1].end == len(text)


def test_many_small_files_are_tokenized_in_few_calls() -> None:
    calls = []
    tokenizer = _Counter(lambda text: calls.append(text) or len(text))  # type: ignore[func-returns-value]
    chunks = split(Document.of_texts({str(i): "some words" for i in range(5000)}), tokenizer, 64, 16)
    assert len(chunks) == len(calls) == 5000 and tokenizer.max_characters == 50_000


@pytest.mark.parametrize(
    "tokens",
    [
        lambda text: len(text) if len(text) > 40 else 0,
        lambda text: len(text) * (3 if len(text) > 40 else 1),
        lambda text: len(text) + 39 * text.count("Z") * (len(text) > 40),
    ],
)
def test_wrong_plans_are_corrected(tokens: Callable[[str], int]) -> None:
    """Short texts, from which the plan is estimated, have fewer tokens than long ones."""
    for text in ("some words " * 500, "a" * 95 + ("Z" * 8 + "a" * 100) * 30):
        for stride in (0, 16, 32):
            _check(Document.of_texts(text), _Counter(tokens), 64, stride)


def test_a_character_longer_than_a_chunk() -> None:
    with pytest.raises(ConfigError, match="max_length: .*'a' of text takes 20 tokens"):
        split(Document.of_texts("aaaa"), _Counter(lambda text: 20 * len(text)), 16, 0)


@pytest.mark.parametrize(
    "max_length, stride, named",
    [(15, 0, "max_length"), (64, 33, "stride"), (64, -1, "stride"), (True, 0, "max_length"), (64.0, 0, "max_length")],
)
def test_lengths_out_of_range(byte_tokenizer: Any, max_length: Any, stride: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}:"):
        split(Document.of_texts("a"), byte_tokenizer, max_length, stride)


def test_progress_ends_at_the_total(bpe: Any) -> None:
    calls: list[tuple[int, int]] = []
    document = Document.of_texts({"a": "word " * 2000, "b": "more " * 1000})
    split(document, bpe, 256, 64, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and calls[-1] == (15_000, 15_000)


def test_a_document_of_300_000_tokens(bpe: Any) -> None:
    text = (sample_text() * 3)[:1_200_000]
    chunks = split(Document.of_texts(text), bpe)
    assert sum(chunk.tokens for chunk in chunks) > 300_000
    assert max(chunk.tokens for chunk in chunks) <= 4096
    assert chunks[-1].end == len(text)
