"""How long the prompt and the answer of a request took, for protocols that report it."""

from __future__ import annotations

import time

from ...engine.request import Output


class Timings:
    """Times of one answer, from its creation on.

    Attributes:
        prompt: seconds from the request to the first output.
        answer: seconds from then to the last output.
        last: the last output; None before the first.
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.prompt, self.answer = 0.0, 0.0
        self.last: Output | None = None

    def add(self, output: Output) -> None:
        now = time.perf_counter()
        if self.last is None:
            self.prompt = now - self._begun
        self.answer = now - self._begun - self.prompt
        self.last = output
