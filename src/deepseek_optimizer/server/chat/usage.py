"""Counts the tokens of a request."""

from __future__ import annotations

from typing import Any

from ...backends.qualities import QUALITIES
from ...engine.request import Output


class Tally:
    """Token counts of all answers to a request.

    Args:
        answers: number of answers; those to the same prompt are consecutive.
        n: number of answers to each prompt.
        dropped: tokens that were dropped from the prompt in advance.
    """

    def __init__(self, answers: int, n: int, dropped: int = 0) -> None:
        self._last: list[Output | None] = [None] * answers
        self._n, self._dropped = n, dropped

    def add(self, index: int, output: Output) -> None:
        self._last[index] = output

    def usage(self, reasoning: int | None = None) -> dict[str, Any]:
        """The `usage` of chat and text completions.

        Args:
            reasoning: tokens of reasoning; None: the field is omitted.
        """
        seen = [output for output in self._last if output is not None]
        prompts = [output for output in self._last[:: self._n] if output is not None]
        prompt, completion = sum(o.prompt_tokens for o in prompts), sum(o.completion_tokens for o in seen)
        values: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(o.cached_tokens for o in prompts)},
        }
        if reasoning is not None:
            values["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        slid = sum(o.dropped_tokens for o in seen)
        if dropped := self._dropped + slid:
            values |= {"dropped_tokens": dropped, "context_tokens": prompt + completion - slid}
        if qualities := [o.quality for o in seen if o.quality is not None]:
            values["quality"] = min(qualities, key=QUALITIES.index)
        return values
