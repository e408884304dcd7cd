"""How long the prompt and the answer of a request took, for protocols that report it."""

from __future__ import annotations

import time
from typing import Any

from ...engine.request import Output


class Timings:
    """Times of one answer, from its creation on.

    Attributes:
        prompt: seconds from the request to the first output with a token.
        answer: seconds from then to the last output.
        last: the last output; None before the first.
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.prompt, self.answer = 0.0, 0.0
        self.last: Output | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the request."""
        return time.perf_counter() - self._begun

    def add(self, output: Output) -> None:
        elapsed = self.elapsed
        if self.last is None:
            self.prompt = elapsed
        self.answer = elapsed - self.prompt
        self.last = output


def native_timings(output: Output, prompt: float, answer: float, processed: int | None = None) -> dict[str, Any]:
    """llama-server's `timings`. The first token comes from the last step of the prompt, so it does not count for the speed.

    Args:
        output: the last one.
        prompt, answer: seconds.
        processed: number of prompt tokens processed so far, with those of the prefix cache; None: all.
    """
    read = max(0, (output.prompt_tokens if processed is None else processed) - output.cached_tokens)
    predicted = output.completion_tokens if processed is None else 0
    decoded = max(0, predicted - 1)
    return {
        "cache_n": output.cached_tokens,
        "prompt_n": read,
        "prompt_ms": prompt * 1e3,
        "prompt_per_token_ms": prompt * 1e3 / max(read, 1),
        "prompt_per_second": read / prompt if prompt else 0.0,
        "predicted_n": predicted,
        "predicted_ms": answer * 1e3,
        "predicted_per_token_ms": answer * 1e3 / decoded if decoded else 0.0,
        "predicted_per_second": decoded / answer if answer else 0.0,
    }


def prompt_progress(output: Output, processed: int, seconds: float) -> dict[str, Any]:
    """llama-server's `prompt_progress`.

    Args:
        output: with the counts of the prompt.
        processed: one of `output.progress`.
        seconds: since the request.
    """
    return {
        "total": output.prompt_tokens,
        "cache": output.cached_tokens,
        "processed": processed,
        "time_ms": round(seconds * 1e3),
    }
