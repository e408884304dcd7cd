"""Tokenizers of GGUF files: byte-level BPE, SentencePiece's BPE, and Gemma 4's BPE over characters.

A GGUF file has tokens and merges, and names the rule that splits text before merging (`tokenizer.ggml.pre`). Transformers'
converter does not support all of these rules and silently uses GPT-2's instead, so that text would be split into other tokens
than the model was trained on; nor does it treat DeepSeek's control tokens as such. Tokenizers are therefore built here, except
those of Llama, Qwen2 and Qwen3, whose rules Transformers has. A file with an unknown rule is refused.

Source of the rules: llama.cpp's llama-vocab.cpp, which quotes those of the tokenizer.json files, and the pre_tokenizer section
of DeepSeek's own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # llama.cpp's token types
_SPACE = "\u2581"  # SentencePiece's

# Letters of scripts with upper and lower case, as listed in the rule of DeepSeek-LLM and V2.
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 "
    "3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 "
    "1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 "
    "1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 "
    "213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 "
    "A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 "
    "118A0-118DF 1E900-1E943"
)
_MARKS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_IDEOGRAPHS = "4E00-9FA5 800-4E00 AC00-D7FF"
_CHINESE_AND_KANA = "4E00-9FA5 3040-309F 30A0-30FF"


def _set(ranges: str) -> str:
    """A regular expression's character class for ranges of hexadecimal code points."""

    def escaped(code: str) -> str:
        character = chr(int(code, 16))
        return f"\\{character}" if character.isascii() and not character.isalnum() else character

    return "[" + "".join("-".join(map(escaped, span.split("-"))) for span in ranges.split()) + "]"


@dataclass(frozen=True)
class Rule:
    """How text is split before merging.

    Attributes:
        patterns: each splits the results of the one before it; none: GPT-2's.
        whole: a piece that is a token is not built by merges.
        add_bos: whether the first marker is added if the file does not say so.
        nfc: text is brought into Unicode's composed form first.
    """

    patterns: tuple[str, ...] = ()
    whole: bool = False
    add_bos: bool = False
    nfc: bool = False


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _words(letters: str = r"\p{L}", digits: str = r"\p{N}", marks: str = r"[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """The pattern of Llama 3 and Qwen2, with differences."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?{marks}|{_SPACES}"


def _cased(digits: str, contractions: str = "", line_marks: str = "/", but: str = "") -> str:
    """The pattern of GPT-4o and Tekken, which splits words where lower case changes to upper case."""
    upper, lower = f"[{_UPPER}{but}]", f"[{_LOWER}{but}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    marks = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n{line_marks}]*"
    return f"{lead}{upper}*{lower}+{contractions}|{lead}{upper}+{lower}*{contractions}|{digits}|{marks}|{_SPACES}"


_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    f"{_set(_CHINESE_AND_KANA)}+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",  # noqa: E501
)
_THREE_DIGITS = r"\p{N}{1,3}"
_DIGITS_ALONE = Rule((r"\p{N}", _GPT2))
_LLAMA3 = Rule((_words(digits=_THREE_DIGITS),), whole=True, add_bos=True)
_QWEN2 = Rule((_words(),), nfc=True)
_GPT4O = Rule((_cased(_THREE_DIGITS, f"{_CONTRACTIONS}?"),))

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), Rule()),
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS_ALONE),
    "command-r": Rule(_DIGITS_ALONE.patterns, nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "lfm2", "falcon3", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Rule(_LLAMA3.patterns)),
    **dict.fromkeys(("glm4", "glm5"), Rule(_LLAMA3.patterns, whole=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open"), Rule(_QWEN2.patterns)),
    "qwen35": Rule((_words(r"[\p{L}\p{M}]", marks=r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),), nfc=True),
    "seed-coder": Rule((_words(marks=r"[^\s\p{L}\p{N}\r\n]+"),)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O),
    "tekken": Rule((_cased(r"\p{N}"),), whole=True, add_bos=True),
    "kimi-k2": Rule((r"\p{Han}+|" + _cased(_THREE_DIGITS, f"{_CONTRACTIONS}?", "", r"&&[^\p{Han}]"),)),
    "deepseek-llm": Rule(
        (r"[\r\n]", rf"\s?{_set(_CASED)}+", rf"\s?{_set(_MARKS)}+", r"\s+$", f"{_set(_IDEOGRAPHS)}+", r"\p{N}+")
    ),
    "deepseek-coder": Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{_set(_IDEOGRAPHS)}+", r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Rule(_DEEPSEEK3)),
}
# What Transformers builds well, by architecture.
_TRANSFORMERS = ("llama", "qwen2", "qwen3")
_TRANSFORMERS_RULES = ("default", "gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen")


def builds(architecture: str, values: Mapping[str, Any]) -> bool:
    """Whether the tokenizer of such a file must be built here rather than by Transformers.

    Args:
        architecture: `general.architecture`.
        values: the header's.
    """
    if values.get("tokenizer.ggml.model") not in ("gpt2", "llama", "gemma4"):
        return False
    known = values["tokenizer.ggml.model"] == "llama" or values.get("tokenizer.ggml.pre", "default") in _TRANSFORMERS_RULES
    return architecture not in _TRANSFORMERS or not known


def build_tokenizer(values: Mapping[str, Any], array: Callable[[str], list[Any]], path: Path) -> Any:
    """Builds Transformers' fast tokenizer from a file's metadata.

    Args:
        values: the header's.
        array: returns the elements of an array by its key; an empty list if there is none.
        path: the file, for errors.

    Raises:
        CheckpointError: the rule is not supported, or tokens, types and merges are inconsistent.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokens, types = array("tokenizer.ggml.tokens"), array("tokenizer.ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or (types and len(types) != len(tokens)):
        raise CheckpointError(
            "the tokenizer has a duplicate token, or the numbers of tokens and of token types differ", file=path
        )
    model = values["tokenizer.ggml.model"]
    if model == "llama":
        scores = array("tokenizer.ggml.scores")
        if len(scores) != len(tokens):
            raise CheckpointError("the tokenizer has no score for each token (tokenizer.ggml.scores)", file=path)
        unknown = _token(values, tokens, "unknown", path) or (tokens[0] if tokens else None)
        prefix = values.get("tokenizer.ggml.add_space_prefix") is not False
        inner, add_bos = _sentencepiece(vocabulary, types or [_NORMAL] * len(tokens), scores, unknown, prefix), True
    elif model == "gemma4":
        inner = _characters(vocabulary, _merges(array("tokenizer.ggml.merges"), path), _token(values, tokens, "unknown", path))
        add_bos = True
    else:
        rule = _rule(values, path)
        inner, add_bos = _byte_level(vocabulary, _merges(array("tokenizer.ggml.merges"), path), rule), rule.add_bos
    kinds = list(zip(tokens, types, strict=True)) if types else []
    inner.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _CONTROL])
    inner.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED])
    named = {name: _token(values, tokens, name, path) for name in ("bos", "eos", "padding", "unknown")}
    before, after = (
        [token] if (token := named[name]) and values.get(f"tokenizer.ggml.add_{name}_token", default) is True else []
        for name, default in (("bos", add_bos), ("eos", False))
    )
    if before or after:
        inner.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(token, vocabulary[token]) for token in {*before, *after}]
        )
    short = {"padding": "pad", "unknown": "unk"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        **{f"{short.get(name, name)}_token": token for name, token in named.items() if token},
    )
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _rule(values: Mapping[str, Any], path: Path) -> Rule:
    name = values.get("tokenizer.ggml.pre", "default")
    if name not in RULES:
        raise CheckpointError(
            f"the tokenizer's pre-tokenization rule {name!r} is not supported (supported: {', '.join(RULES)}); use the "
            "tokenizer of the original model: AutoTokenizer.from_pretrained(its name)",
            file=path,
        )
    return RULES[name]


def _merges(listed: list[Any], path: Path) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ")) for merge in listed]
    if invalid := next((merge for merge in merges if len(merge) != 2), None):
        raise CheckpointError(f"the tokenizer has a merge of other than two tokens: {' '.join(invalid)!r}", file=path)
    return merges


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]], rule: Rule) -> Any:
    """BPE over the bytes of UTF-8."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=not splits)])
    inner.decoder = decoders.ByteLevel()
    if rule.nfc:
        inner.normalizer = normalizers.NFC()
    return inner


def _characters(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str | None) -> Any:
    """BPE over characters with SentencePiece's sign for spaces, and the tokens of its bytes for a character without a token.
    Merges do not cross line breaks. `unknown`: as in `_sentencepiece`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", _SPACE)
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[^\n]+|[\n]+"), behavior="isolated")
    inner.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return inner


def _sentencepiece(vocabulary: dict[str, int], types: list[int], scores: list[float], unknown: str | None, prefix: bool) -> Any:
    """SentencePiece's BPE: of the pairs that form a token, the one with the highest score is merged first.

    Args:
        unknown: the token for characters that have no token, not even for their bytes.
        prefix: whether a space is put before a text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    normal = {token for token, kind in zip(vocabulary, types, strict=True) if kind == _NORMAL}
    ranked = sorted(
        (-score, i, token) for i, (token, score) in enumerate(zip(vocabulary, scores, strict=True)) if token in normal
    )
    merges = [
        (token[:cut], token[cut:])
        for _, _, token in ranked
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _token(values: Mapping[str, Any], tokens: list[str], name: str, path: Path) -> str | None:
    """The special token `name` of the file ("bos", "eos", ...); None if it has none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in values:
        return None
    if type(values[key]) is not int or not 0 <= values[key] < len(tokens):
        raise CheckpointError(f"{key} is {values[key]!r}, but must be an id of the {len(tokens)} tokens", file=path)
    return tokens[values[key]]
