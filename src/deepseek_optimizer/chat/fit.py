"""Chooses the messages of a dialogue to keep when it no longer fits into its window.

A client sends the whole dialogue with every turn. Processing all of it through a window each time would cost more and more, so
whole messages are dropped: oldest first, but never the system prompt, a pinned message or the last one. The cut must not move
with every turn, or the prefix cache would be useless: it is placed where the tokens before it first reach a multiple of a
quarter of the window, so that it stays for many turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError

Message = dict[str, Any]
_STEP = 0.25  # of the window


@dataclass(frozen=True)
class Fitted:
    """messages: those that are kept, in order. dropped: number of messages that are not."""

    messages: list[Message]
    dropped: int = 0


def is_pinned(message: Message) -> bool:
    """Whether a message must be kept: a system or developer message, or one with the field `pinned`."""
    return message.get("role") in ("system", "developer") or bool(message.get("pinned"))


def fit(
    messages: Sequence[Message], tokens: Callable[[list[Message]], int], weight: Callable[[Message], int], max_tokens: int
) -> Fitted:
    """The messages that fit.

    Args:
        tokens: number of tokens of a prompt with these messages.
        weight: approximate number of tokens of one message.
        max_tokens: maximum length of the prompt.

    Raises:
        RequestError: the messages that must be kept do not fit.
    """
    whole = list(messages)
    if tokens(whole) <= max_tokens:
        return Fitted(whole)
    loose = [n for n, message in enumerate(whole[:-1]) if not is_pinned(message)]
    cuts = _cuts(whole, loose, weight, max(1, int(_STEP * max_tokens)))
    low, high = 0, len(cuts) - 1
    while low < high:  # binary search for the first sufficient cut: dropping more leaves fewer tokens
        middle = (low + high) // 2
        if tokens(_without(whole, loose[: cuts[middle]])) <= max_tokens:
            high = middle
        else:
            low = middle + 1
    remaining = _without(whole, loose[: cuts[low]])
    if (size := tokens(remaining)) > max_tokens:
        raise RequestError(
            "messages",
            f"the last message and those that must be kept have {size} tokens, but only {max_tokens} fit; shorten them",
        )
    return Fitted(remaining, cuts[low])


def _cuts(messages: list[Message], loose: list[int], weight: Callable[[Message], int], step: int) -> list[int]:
    """Possible numbers of messages to drop: up to each position where their tokens first reach a multiple of `step`, never
    separating an answer from its question; and all of them."""
    cuts, total, reached = [], 0, step
    for count, n in enumerate(loose, 1):
        total += weight(messages[n])
        follows = messages[loose[count]] if count < len(loose) else messages[-1]
        if total >= reached and follows.get("role") == "user":
            cuts.append(count)
            reached = total // step * step + step
    return cuts if cuts and cuts[-1] == len(loose) else [*cuts, len(loose)]


def _without(messages: list[Message], dropped: list[int]) -> list[Message]:
    indices = set(dropped)
    return [message for n, message in enumerate(messages) if n not in indices]
