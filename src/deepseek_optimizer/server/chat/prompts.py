"""Tokenizing the prompts of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import RequestError
from ..http.caller import Caller
from ..protocol.prompt_parts import Part
from ..state import ServerState


def tokens_of(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids of a text, in which control tokens are recognized.

    Args:
        tokenizer: of Transformers.
        text: the text.
        special: whether the tokenizer adds special tokens, such as a begin token.
    """
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def mixed_ids(tokenizer: Any, parts: Sequence[Part], special: bool = True) -> list[int]:
    """Token ids of a prompt of texts and token ids.

    Args:
        tokenizer: of Transformers.
        parts: of the prompt.
        special: whether the tokenizer adds special tokens to a text at the beginning.
    """
    ids: list[int] = []
    for number, part in enumerate(parts):
        ids += tokens_of(tokenizer, part, special and number == 0) if isinstance(part, str) else [part]
    return ids


async def text_prompts(state: ServerState, prompt: Any, special: bool, caller: Caller, field: str) -> list[list[int]]:
    """Token ids of the prompts of /v1/completions and /v1/embeddings.

    Args:
        state: the server's.
        prompt: a text or several, or token ids of one or several.
        special: whether the tokenizer adds special tokens to texts.
        caller: who sent the request.
        field: of the request, for errors.

    Raises:
        RequestError: a prompt has no tokens, or more than the model's context.
        ApiError: see `FairQueue.run`.
    """
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        for text in prompt:
            state.prompt_size.check([text], field)
        prompt = await state.tokenizing(lambda lane: [tokens_of(lane.tokenizer, text, special) for text in prompt], caller)
    if not all(prompt):
        raise RequestError(field, "must have at least one token")
    return list(prompt)
