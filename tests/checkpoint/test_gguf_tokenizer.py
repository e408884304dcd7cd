"""Byte-level tokenizers of GGUF files give the tokens of the tokenizer that the file was written from."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deepseek_optimizer import load_tokenizer
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.checkpoint.gguf_tokenizer import RULES, _set
from deepseek_optimizer.errors import CheckpointError
from support.gguf_deepseek2 import v2_lite, write_gguf
from support.models import random_model

BOS, EOS, USER, THINK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<think>"
TEXT = (
    "The quick brown fox jumped over 1234567 lazy dogs;\n\n  it didn't care!  \tNaïve façade, Ωmega Straße. "
    "def f(x):\n    return x[0] + 3.14159e-10  # 注释 你好，世界。かな カナ 한국어 ✓ 😀 e\u0301 \r\n end   "
)
# The pre-tokenizers before ByteLevel in DeepSeek's tokenizer.json files: Coder's and V3's.
PUBLISHED: dict[str, Callable[[], list]] = {
    "deepseek-coder": lambda: [
        *(
            pre_tokenizers.Split(Regex(cut), "isolated")
            for cut in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
        ),
        pre_tokenizers.Digits(individual_digits=True),
    ],
    "deepseek-v3": lambda: [
        pre_tokenizers.Split(Regex(cut), "isolated")
        for cut in (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        )
    ],
}


def original(rule: str) -> Tokenizer:
    """A tokenizer trained on the text above, with DeepSeek's pre-tokenizers."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([*PUBLISHED[rule](), pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[BOS, EOS, USER], show_progress=False
    )
    inner.train_from_iterator([TEXT] * 3, trainer)
    inner.add_tokens([AddedToken(THINK, normalized=False)])
    return inner


def writes(inner: Tokenizer, rule: str | None, **more: object) -> Callable[[gguf.GGUFWriter], None]:
    """The metadata that the converter writes for it."""
    ids = inner.get_vocab()
    vocabulary = sorted(ids, key=lambda token: ids[token])
    merges = [" ".join(merge) for merge in json.loads(inner.to_str())["model"]["merges"]]
    kinds = {BOS: 3, EOS: 3, USER: 3, THINK: 4}

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if rule is not None:
            writer.add_tokenizer_pre(rule)
        writer.add_token_list(more.get("tokens", vocabulary))
        writer.add_token_types([kinds.get(token, 1) for token in vocabulary])
        writer.add_token_merges(more.get("merges", merges))
        writer.add_bos_token_id(more.get("bos", inner.token_to_id(BOS)))
        writer.add_eos_token_id(inner.token_to_id(EOS))
        writer.add_add_bos_token(more.get("add_bos", True))
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")

    return write


def save(path: Path, tokenizer: Callable[[gguf.GGUFWriter], None] | None, **config: int) -> Path:
    model = random_model(v2_lite(vocab_size=500, num_hidden_layers=1, first_k_dense_replace=0, **config))
    return write_gguf(path, model, {"": "Q8_0"}, tokenizer=tokenizer)


@pytest.mark.parametrize("rule", PUBLISHED)
def test_tokens_equal_the_original(tmp_path: Path, rule: str) -> None:
    inner = original(rule)
    tokenizer = load_tokenizer(save(tmp_path / "m.gguf", writes(inner, rule)))
    rng = random.Random(0)
    pieces = [TEXT, BOS, USER, THINK, "  ", "\n\n", "123456789", "don't", "漢字かな", "'ll", "½²", "a\u0301", "x" * 40]
    for _ in range(50):
        text = "".join(rng.choice(pieces)[rng.randrange(30) :] for _ in range(rng.randrange(1, 9)))
        expected = inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.encode(text) == [inner.token_to_id(BOS), *expected]
        assert tokenizer.decode(expected) == inner.decode(expected, skip_special_tokens=False)
    assert tokenizer.encode(f"{USER}{THINK}", add_special_tokens=False) == [inner.token_to_id(USER), inner.token_to_id(THINK)]
    assert tokenizer.decode(tokenizer.encode(f"{USER}{THINK}x"), skip_special_tokens=True) == f"{THINK}x"
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS) and len(tokenizer) == inner.get_vocab_size()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == f"{BOS}x"


def test_without_a_marker_in_front(tmp_path: Path) -> None:
    inner = original("deepseek-v3")
    tokenizer = load_tokenizer(save(tmp_path / "m.gguf", writes(inner, "deepseek-v3", add_bos=False)))
    assert tokenizer.encode("fox") == inner.encode("fox").ids


def cut(patterns: Iterable[str], text: str) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        pieces = [piece for whole in pieces for piece, _ in split.pre_tokenize_str(whole)]
    return pieces


def test_the_rule_of_v2() -> None:
    """There is no tokenizer.json of V2 here, so the parts are tested by their meaning. Each splits the pieces of the one
    before, and ":-~" of the marks includes the ASCII letters, so that these are split from others."""
    rule = RULES["deepseek-llm"].patterns
    pieces = ["Hello", " w", "ö", "rld", ",", " it", "'", "s", " ", "2024", "!", "\n", "Ω", "mega"]
    assert cut(rule, "Hello wörld, it's 2024!\nΩmega") == pieces
    assert cut(rule, "你好，世界。 end  ") == ["你好", "，", "世界", "。", " end", "  "]
    assert cut(rule[1:2], "Äß-Ж_Ա+ꭰ=ა/Ａ b") == ["Äß", "-", "Ж", "_", "Ա", "+", "ꭰ", "=ა/", "Ａ", " b"]
    listed = {c for c in map(chr, range(0x1E944)) if c.isalpha() and cut(rule[1:2], f"a{c}") == [f"a{c}"]}
    assert len(listed) == 2729 and {unicodedata.category(c) for c in listed} == {"Lu", "Ll", "Lt"}
    assert _set("41-5A B5 21-2F") == r"[A-Zµ\!-\/]"


# How each rule splits "Don't SayHello 1234  x!\n\n": by contractions, changes of case, digits and spaces.
_GPT2_PIECES = ["Don", "'t", " SayHello", " 1234", " ", " x", "!", "\n\n"]
_QWEN_PIECES = ["Don", "'t", " SayHello", " ", "1", "2", "3", "4", " ", " x", "!\n\n"]
_LLAMA3_PIECES = ["Don", "'t", " SayHello", " ", "123", "4", " ", " x", "!\n\n"]
CUTS = {
    "starcoder": ["Don", "'t", " SayHello", " ", "1", "2", "3", "4", " ", " x", "!", "\n\n"],
    "command-r": ["Don", "'t", " SayHello", " ", "1", "2", "3", "4", " ", " x", "!", "\n\n"],
    "llama-bpe": _LLAMA3_PIECES,
    "glm4": _LLAMA3_PIECES,
    "dbrx": _LLAMA3_PIECES,
    "qwen2": _QWEN_PIECES,
    "qwen35": _QWEN_PIECES,
    "stablelm2": _QWEN_PIECES,
    "seed-coder": ["Don", "'t", " SayHello", " ", "1", "2", "3", "4", " ", " x", "!", "\n\n"],
    "minimax-m2": ["Don't", " Say", "Hello", " ", "123", "4", " ", " x", "!\n\n"],
    "tekken": ["Don", "'t", " Say", "Hello", " ", "1", "2", "3", "4", " ", " x", "!\n\n"],
    "kimi-k2": ["Don't", " Say", "Hello", " ", "123", "4", " ", " x", "!\n\n"],
    "hunyuan-dense": ["Don", "'t", " SayHello", " ", "123", "4", " ", " x", "!\n\n"],
}


@pytest.mark.parametrize("rule", CUTS)
def test_cuts(rule: str) -> None:
    assert cut(RULES[rule].patterns, "Don't SayHello 1234  x!\n\n") == CUTS[rule]


def test_scripts_that_rules_treat_differently() -> None:
    assert cut(RULES["kimi-k2"].patterns, "Go语言ok") == ["Go", "语言", "ok"]
    assert cut(RULES["minimax-m2"].patterns, "Go语言ok") == ["Go语言ok"]
    combining = "e\u0301a"
    assert cut(RULES["qwen35"].patterns, combining) == [combining]
    assert cut(RULES["qwen2"].patterns, combining) == ["e", "\u0301a"]
    assert cut(RULES["gpt-2"].patterns, "a b") == ["a b"]  # GPT-2's own splitting is ByteLevel's


def test_pieces_that_are_tokens(tmp_path: Path) -> None:
    """Llama 3 takes a piece that is a token as it is, whatever the merges would give."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "bc", "abc"]

    def write(rule: str) -> Callable[[gguf.GGUFWriter], None]:
        def add(writer: gguf.GGUFWriter) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(rule)
            writer.add_token_list(tokens)
            writer.add_token_types([1] * len(tokens))
            writer.add_token_merges(["b c"])

        return add

    for rule, expected in (("lfm2", ["abc"]), ("dbrx", ["a", "bc"])):
        tokenizer = load_tokenizer(save(tmp_path / f"{rule}.gguf", write(rule)))
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc", add_special_tokens=False)) == expected


@pytest.mark.parametrize(
    "more, why",
    [
        ({"rule": "falcon"}, "rule 'falcon' is not supported.*AutoTokenizer.from_pretrained"),
        ({"merges": ["a b c"]}, "merge of other than two tokens: 'a b c'"),
        ({"merges": ["zz zzz"]}, "no tokenizer that can be read"),
        ({"tokens": ["a"] * 400}, "a duplicate token"),
        ({"bos": 100_000}, "bos_token_id is 100000, but must be"),
    ],
)
def test_unsupported_tokenizers_are_errors_but_the_model_opens(tmp_path: Path, more: dict, why: str) -> None:
    inner = original("deepseek-v3")
    path = save(tmp_path / "m.gguf", writes(inner, more.pop("rule", "deepseek-v3"), **more))
    with pytest.raises(CheckpointError, match=why):
        load_tokenizer(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read("lm_head.weight").shape == (500, 96)


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", None)
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        load_tokenizer(path)
