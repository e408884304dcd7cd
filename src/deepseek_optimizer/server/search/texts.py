"""From texts to token ids for embedding and scoring: prompts, pairs of texts, truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...checkpoint.sentence_transformers import EmbeddingSettings
from ...errors import ContextLengthError, RequestError, excerpt
from ..chat.prompts import mixed_ids
from ..http.caller import Caller
from ..http.problems import ApiError
from ..protocol.prompt_parts import Part, prompts_of
from ..state import ServerState
from ..tokens.prompt_size import too_long

# `input_type` of Cohere's and NVIDIA's clients -> names of prompts, as sentence-transformers' encode_query and encode_document
# look them up
_TYPES = {
    "query": ("query", "search_query"),
    "search_query": ("query", "search_query"),
    "document": ("document", "passage", "corpus", "search_document"),
    "passage": ("document", "passage", "corpus", "search_document"),
    "search_document": ("document", "passage", "corpus", "search_document"),
}


@dataclass(frozen=True)
class Truncation:
    """How texts that are too long are shortened.

    Attributes:
        tokens: maximum number of tokens of a text, special tokens included; None: a text that is too long is an error.
        side: which end is dropped; None: that of the tokenizer.
    """

    tokens: int | None = None
    side: Literal["left", "right"] | None = None


@dataclass(frozen=True)
class Tokens:
    """A text, or a pair of texts, as token ids.

    Attributes:
        ids: token ids.
        types: type of each token; empty: all 0.
        skip: number of tokens at the start that pooling skips.
    """

    ids: list[int]
    types: tuple[int, ...] = ()
    skip: int = 0


def truncation(state: ServerState, tokens: int | None, side: Literal["left", "right"] | None) -> Truncation:
    """The truncation that a request asks for.

    Args:
        state: the server's.
        tokens: `truncate_prompt_tokens`; -1: the model's context.
        side: `truncation_side`.

    Raises:
        RequestError: more tokens than the context.
    """
    if tokens is None:
        return Truncation()
    context = state.engine.context
    if tokens > context:
        raise RequestError(
            "truncate_prompt_tokens",
            f"is greater than the model's context of {context:,} tokens. Please request a smaller truncation size.",
        )
    return Truncation(context if tokens == -1 else tokens, side)


def prompt_name(settings: EmbeddingSettings, input_type: str | None, name: str | None) -> str | None:
    """The name of the prompt for a request's texts; None: they have none.

    Args:
        settings: the checkpoint's.
        input_type: what the texts are, such as "query" or "document". A checkpoint without a prompt for it embeds them as they
            are.
        name: of the prompt.

    Raises:
        ApiError: 400, there is no prompt of this name.
    """
    prompts = settings.prompts
    if name is not None:
        if name not in prompts:
            known = ", ".join(map(excerpt, list(prompts)[:10])) or "none"
            raise ApiError(400, f"prompt_name: must be one of the model's prompts ({known})", param="prompt_name")
        return name
    if input_type is not None:
        return next((one for one in _TYPES.get(input_type, (input_type,)) if one in prompts), None)
    return settings.default_prompt


async def embedding_tokens(
    state: ServerState,
    given: Any,
    prompt: str | None,
    special: bool,
    cut: Truncation,
    caller: Caller,
    field: str = "input",
) -> list[Tokens]:
    """Token ids of the texts to embed.

    Args:
        state: the server's.
        given: see `prompts_of`. Token ids are used as they are.
        prompt: name of the prompt to put before each text; None: none.
        special: whether the tokenizer adds special tokens.
        cut: see `Truncation`.
        caller: who sent the request.
        field: of the request, for errors.

    Raises:
        RequestError: a text has no tokens, or more than the model's context.
        ApiError: see `FairQueue.run`.
    """
    settings = state.settings.embedding
    prompts, _ = prompts_of(given)
    if not any(isinstance(part, str) for parts in prompts for part in parts):
        return [Tokens(_cut([int(part) for part in parts], cut)) for parts in prompts]
    texts = [str(parts[0]) for parts in prompts if _is_text(parts)]
    if cut.tokens is None:
        for parts in prompts:
            state.prompt_size.check((part for part in parts if isinstance(part, str)), field)
    before = "" if prompt is None else settings.prompts[prompt]

    def encode(tokenizer: Any) -> list[Tokens]:
        skip = 0
        if before and not settings.include_prompt:
            ids = _encoded(tokenizer, [before], special, Truncation())[0].ids
            skip = len(ids) - (bool(ids) and ids[-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id))
        whole = [before + (text.lower() if settings.lower_case else text) for text in texts]
        encoded = iter(_encoded(tokenizer, whole, special, cut) if whole else ())
        return [
            replace(next(encoded), skip=skip) if _is_text(parts) else Tokens(_cut(mixed_ids(tokenizer, parts, special), cut))
            for parts in prompts
        ]

    tokens = await state.tokenizing(lambda lane: encode(lane.tokenizer), caller)
    check_lengths(state, tokens, field)
    return tokens


async def pair_tokens(
    state: ServerState, pairs: Sequence[tuple[str, str]], cut: Truncation, caller: Caller, field: str
) -> list[Tokens]:
    """Token ids of pairs of texts for a cross-encoder. Truncation shortens the longer text of a pair.

    Args:
        state: the server's.
        pairs: the texts.
        cut: see `Truncation`.
        caller: who sent the request.
        field: of the request, for errors.

    Raises:
        RequestError: a pair has more tokens than the model's context.
        ApiError: see `FairQueue.run`.
    """
    tokens = await state.tokenizing(
        lambda lane: _encoded(lane.tokenizer, [a for a, _ in pairs], True, cut, [b for _, b in pairs]), caller
    )
    check_lengths(state, tokens, field)
    return tokens


async def shortened(state: ServerState, texts: Sequence[str], tokens: int, caller: Caller) -> list[str]:
    """The beginning of each text, with at most this number of tokens (Cohere's `max_tokens_per_doc`)."""

    def cut(tokenizer: Any) -> list[str]:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=True,
            max_length=tokens,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [text[: ends[-1][1]] if ends else text for text, ends in zip(texts, encoded["offset_mapping"], strict=True)]

    return await state.tokenizing(lambda lane: cut(lane.tokenizer), caller)


def check_lengths(state: ServerState, tokens: Sequence[Tokens], field: str) -> None:
    """Raises RequestError if a text has no tokens, or more than the model's context."""
    context = state.engine.context
    for one in tokens:
        if not one.ids:
            raise RequestError(field, "must have at least one token")
        if len(one.ids) > context:
            message = f"{too_long(context, len(one.ids))}, or send truncate_prompt_tokens: -1"
            raise ContextLengthError(field, message, len(one.ids), context)


def _is_text(parts: Sequence[Part]) -> bool:
    return len(parts) == 1 and isinstance(parts[0], str)


def _cut(ids: list[int], cut: Truncation) -> list[int]:
    if cut.tokens is None or len(ids) <= cut.tokens:
        return ids
    return ids[-cut.tokens :] if cut.side == "left" else ids[: cut.tokens]


def _encoded(tokenizer: Any, texts: list[str], special: bool, cut: Truncation, pairs: list[str] | None = None) -> list[Tokens]:
    """Encodes texts, or pairs of texts. Truncation keeps special tokens."""
    if cut.tokens is not None and special and cut.tokens <= tokenizer.num_special_tokens_to_add(pair=pairs is not None):
        raise RequestError("truncate_prompt_tokens", "leaves no room for the text beside the special tokens; raise it")
    side = tokenizer.truncation_side
    options: dict[str, Any] = {} if cut.tokens is None else {"truncation": True, "max_length": cut.tokens}
    try:
        tokenizer.truncation_side = cut.side or side
        encoded = tokenizer(texts, pairs, add_special_tokens=special, verbose=False, **options)
    finally:
        tokenizer.truncation_side = side
    ids = encoded["input_ids"]
    types = encoded.get("token_type_ids") or [()] * len(ids)
    return [Tokens(list(i), tuple(t) if any(t) else ()) for i, t in zip(ids, types, strict=True)]
