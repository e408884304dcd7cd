"""Texts to the tokens of prompts."""

from __future__ import annotations

from typing import Any

from ...errors import RequestError
from ..http.caller import Caller
from ..state import ServerState


def tokens_of(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Of a text as it is: what reads like a control token is one.

    Args:
        special: whether the tokenizer adds its own, such as a begin token.
    """
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


async def text_prompts(state: ServerState, prompt: Any, special: bool, caller: Caller, field: str) -> list[list[int]]:
    """Of /v1/completions and /v1/embeddings: one text or several, as characters or tokens.

    Raises:
        RequestError: one of them has no token, or more than the model's context.
        ApiError: as of `FairQueue.run`.
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
