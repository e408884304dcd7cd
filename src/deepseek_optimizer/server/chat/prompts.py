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


async def text_prompts(
    state: ServerState, prompt: Any, special: bool, caller: Caller, field: str, whole: bool = True
) -> list[list[int]]:
    """Token ids of the prompts of /v1/completions and /v1/embeddings.

    Args:
        state: the server's.
        prompt: a text or several, or token ids of one or several.
        special: whether the tokenizer adds special tokens to texts.
        caller: who sent the request.
        field: of the request, for errors.
        whole: whether the prompts must fit the context; otherwise `truncated` shortens them.

    Raises:
        RequestError: a prompt has no tokens, or more than the model's context.
        ApiError: see `FairQueue.run`.
    """
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        for text in prompt if whole else ():
            state.prompt_size.check([text], field)
        prompt = await state.tokenizing(lambda lane: [tokens_of(lane.tokenizer, text, special) for text in prompt], caller)
    if not all(prompt):
        raise RequestError(field, "must have at least one token")
    return list(prompt)


def truncated(
    state: ServerState, prompts: list[list[int]], tokens: int | None, side: str | None, max_tokens: int
) -> list[list[int]]:
    """Prompts shortened as vLLM's `truncate_prompt_tokens` says.

    Args:
        state: the server's.
        prompts: token ids.
        tokens: maximum number of tokens of a prompt; -1: what the context has room for besides `max_tokens`; None: any.
        side: the end that is dropped, "left" or "right"; None: left.
        max_tokens: maximum number of tokens of an answer.

    Raises:
        RequestError: more tokens than the context.
    """
    if tokens is None:
        return prompts
    context = state.engine.context
    if tokens > context:
        raise RequestError(
            "truncate_prompt_tokens",
            f"is greater than the model's context of {context} tokens. Please request a smaller truncation size.",
        )
    limit = max(1, state.engine.room - max_tokens) if tokens == -1 else tokens
    return [ids[:limit] if side == "right" else ids[-limit:] for ids in prompts]
