"""Tokens by which models trained to fill in the middle mark the text before and after a gap, found by their names.

Sources: the model cards and papers of the families that are named below; Bavarian et al. 2022 (arXiv:2207.14255) for the orders
"prefix, suffix, middle" and "suffix, prefix".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class _Names(NamedTuple):
    prefix: str
    suffix: str
    middle: str | None  # None: the suffix comes first, and the model continues the prefix


_FAMILIES = (
    _Names("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, Granite 3.3
    _Names("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder, DeepSeek-V2 and V3
    _Names("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, StarCoder2, Granite Code
    _Names("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    _Names("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM, CodeGeeX4
    _Names("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    _Names("<PRE>", "<SUF>", "<MID>"),
    _Names("[PREFIX]", "[SUFFIX]", None),  # Codestral
)
_REPOSITORY = ("<|repo_name|>", "<reponame>", "<repo_name>")
_FILE = ("<|file_sep|>", "<file_sep>")
_ENDS = ("<|fim_pad|>", "<fim_pad>", "▁<EOT>", "<EOT>", "<|file_separator|>")  # end the filled-in text, as the file tokens do


@dataclass(frozen=True)
class FillIn:
    """Token ids of a tokenizer for filling in.

    Attributes:
        prefix, suffix: before the text before the gap, and before the text after it.
        middle: after both, where the model begins; None: the suffix comes first, and the model continues the prefix.
        begin: the token that begins a text; None: there is none.
        repository, file: before the name of a repository, and before the name of a file; None: the model has none.
        stops: tokens that end the text, besides the end of text.
    """

    prefix: int
    suffix: int
    middle: int | None
    begin: int | None
    repository: int | None
    file: int | None
    stops: tuple[int, ...]

    def ids(self, before: list[int], after: list[int], start: list[int]) -> list[int]:
        """The prompt for a gap.

        Args:
            before, after: tokens of the text before and after it.
            start: tokens of the beginning of the text that fills it.
        """
        if self.middle is None:
            return [self.suffix, *after, self.prefix, *before, *start]
        return [self.prefix, *before, self.suffix, *after, self.middle, *start]


def fill_in_tokens(tokenizer: Any) -> FillIn | None:
    """The tokens of a tokenizer for filling in; None if it has none.

    Args:
        tokenizer: of Transformers.
    """

    def id_of(name: str | None) -> int | None:
        found = None if name is None else tokenizer.convert_tokens_to_ids(name)
        return found if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == name else None

    def first_of(names: tuple[str, ...]) -> int | None:
        return next((found for name in names if (found := id_of(name)) is not None), None)

    for names in _FAMILIES:
        prefix, suffix, middle = id_of(names.prefix), id_of(names.suffix), id_of(names.middle)
        if prefix is None or suffix is None or (middle is None and names.middle is not None):
            continue
        repository, file = first_of(_REPOSITORY), first_of(_FILE)
        ends = (prefix, suffix, middle, repository, file, *map(id_of, _ENDS))
        begin = tokenizer.bos_token_id if getattr(tokenizer, "add_bos_token", False) else None
        stops = tuple(dict.fromkeys(token for token in ends if token is not None))
        return FillIn(prefix, suffix, middle, begin, repository, file, stops)
    return None
