"""Which messages of a dialogue that has outgrown its window are still told to the model.

A client sends the whole dialogue with every turn. Reading all of it through a window each time would cost more and more, so
whole messages are left out: the oldest first, never the system prompt, a pinned message or the last one. Where the cut is must
not wander with every turn, or nothing in the prefix cache would fit any longer: it lies where the tokens before it first reach
a multiple of a quarter of the window, so that it stays for many turns.
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
    """messages: that stay, in order. dropped: how many do not."""

    messages: list[Message]
    dropped: int = 0


def is_pinned(message: Message) -> bool:
    """Whether a message must stay: the system's, a tool's description, or one that says so itself."""
    return message.get("role") in ("system", "developer") or bool(message.get("pinned"))


def fit(
    messages: Sequence[Message], tokens: Callable[[list[Message]], int], weight: Callable[[Message], int], most: int
) -> Fitted:
    """The messages that fit.

    Args:
        tokens: of a prompt made of these messages.
        weight: about the tokens of one message.
        most: tokens of the prompt.

    Raises:
        RequestError: what must stay does not fit.
    """
    whole = list(messages)
    if tokens(whole) <= most:
        return Fitted(whole)
    loose = [n for n, message in enumerate(whole[:-1]) if not is_pinned(message)]
    cuts = _cuts(whole, loose, weight, max(1, int(_STEP * most)))
    low, high = 0, len(cuts) - 1
    while low < high:  # the first cut that is enough: the more goes, the fewer tokens stay
        middle = (low + high) // 2
        if tokens(_without(whole, loose[: cuts[middle]])) <= most:
            high = middle
        else:
            low = middle + 1
    kept = _without(whole, loose[: cuts[low]])
    if (left := tokens(kept)) > most:
        raise RequestError(
            "messages", f"the last one and those that must stay take {left} tokens, and there is room for {most}"
        )
    return Fitted(kept, cuts[low])


def _cuts(messages: list[Message], loose: list[int], weight: Callable[[Message], int], step: int) -> list[int]:
    """How many of the loose messages may be left out: up to each place where theirs first reach a multiple of `step` tokens,
    never so that an answer stands without its question; and all of them."""
    found, total, reached = [], 0, step
    for count, n in enumerate(loose, 1):
        total += weight(messages[n])
        follows = messages[loose[count]] if count < len(loose) else messages[-1]
        if total >= reached and follows.get("role") == "user":
            found.append(count)
            reached = total // step * step + step
    return found if found and found[-1] == len(loose) else [*found, len(loose)]


def _without(messages: list[Message], left_out: list[int]) -> list[Message]:
    gone = set(left_out)
    return [message for n, message in enumerate(messages) if n not in gone]
