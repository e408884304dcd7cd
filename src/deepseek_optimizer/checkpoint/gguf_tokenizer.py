"""Byte-level BPE tokenizers of DeepSeek's GGUF files.

A GGUF file has tokens and merges, and names the rule that splits text before merging (`tokenizer.ggml.pre`). Transformers'
converter does not support DeepSeek's rules and silently uses GPT-2's instead; nor does it treat DeepSeek's control tokens as
such. Text would be split into other tokens than the model was trained on. These tokenizers are therefore built here; a file of
this architecture with another rule is refused.

Source of the rules: llama.cpp's llama-vocab.cpp, and the pre_tokenizer section of DeepSeek's own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types

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


# Rules as sequences of patterns, each of which splits the results of the one before it. None: GPT-2's rule.
RULES: Mapping[str, tuple[str, ...] | None] = {
    "default": None,
    "gpt-2": None,
    "deepseek-llm": (r"[\r\n]", rf"\s?{_set(_CASED)}+", rf"\s?{_set(_MARKS)}+", r"\s+$", f"{_set(_IDEOGRAPHS)}+", r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{_set(_IDEOGRAPHS)}+", r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        f"{_set(_CHINESE_AND_KANA)}+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",  # noqa: E501
    ),
}


def builds(architecture: str, values: Mapping[str, Any]) -> bool:
    """Whether the tokenizer of such a file must be built here rather than by Transformers.

    Args:
        architecture: `general.architecture`.
        values: the header's.
    """
    own = architecture == "deepseek2" or str(values.get("tokenizer.ggml.pre", "")).startswith("deepseek-")
    return own and values.get("tokenizer.ggml.model") == "gpt2" and values.get("tokenizer.ggml.pre") != "deepseek-r1-qwen"


def build_tokenizer(values: Mapping[str, Any], array: Callable[[str], list[Any]], path: Path) -> Any:
    """Builds Transformers' fast tokenizer from a file's metadata.

    Args:
        values: the header's.
        array: returns the elements of an array by its key; an empty list if there is none.
        path: the file, for errors.

    Raises:
        CheckpointError: the rule is not supported, or tokens, types and merges are inconsistent.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rule = values.get("tokenizer.ggml.pre", "default")
    if rule not in RULES:
        raise CheckpointError(
            f"the tokenizer's pre-tokenization rule {rule!r} is not supported (supported: {', '.join(RULES)}); use the "
            "tokenizer of the original model: AutoTokenizer.from_pretrained(its name)",
            file=path,
        )
    tokens, types = array("tokenizer.ggml.tokens"), array("tokenizer.ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or (types and len(types) != len(tokens)):
        raise CheckpointError(
            "the tokenizer has a duplicate token, or the numbers of tokens and of token types differ", file=path
        )
    merges = [tuple(merge.split(" ")) for merge in array("tokenizer.ggml.merges")]
    if invalid := next((merge for merge in merges if len(merge) != 2), None):
        raise CheckpointError(f"the tokenizer has a merge of other than two tokens: {' '.join(invalid)!r}", file=path)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    patterns = RULES[rule]
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns or ()]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=patterns is None)])
    inner.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True)) if types else []
    inner.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _CONTROL])
    inner.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED])
    named = {name: _token(values, tokens, name, path) for name in ("bos", "eos", "padding", "unknown")}
    before, after = (
        [token] if (token := named[name]) and values.get(f"tokenizer.ggml.add_{name}_token") is True else []
        for name in ("bos", "eos")
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


def _token(values: Mapping[str, Any], tokens: list[str], name: str, path: Path) -> str | None:
    """The special token `name` of the file ("bos", "eos", ...); None if it has none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in values:
        return None
    if type(values[key]) is not int or not 0 <= values[key] < len(tokens):
        raise CheckpointError(f"{key} is {values[key]!r}, but must be an id of the {len(tokens)} tokens", file=path)
    return tokens[values[key]]
