"""The number of prompt tokens in a step (chunked prefill), limited so that long prompts do not stall other streams.

A step of d decoding rows takes t(d) seconds, and a prompt token adds s. With `stall` = r a step may take r t(d), so there is
room for (r - 1) t(d) / s prompt tokens; without decoding rows, prompt tokens fill the step. Both times are measured while the
engine runs. Does not import torch.
"""

from __future__ import annotations

from .step_times import StepTimes

MIN_TOKENS = 8  # with fewer, reading the weights would dominate the cost
_UNKNOWN = 64  # number of tokens before times have been measured


class PromptBudget:
    """Chooses how many prompt tokens a step processes.

    Args:
        max_tokens: maximum number of tokens in a step.
        stall: maximum factor by which prompt tokens may prolong a step; None: no limit.
        times: measured step times.
        fixed: fixed chunk size in tokens, whatever else runs, for models whose results depend on the chunking; None: any size.
    """

    def __init__(self, max_tokens: int, stall: float | None, times: StepTimes, fixed: int | None = None) -> None:
        self.max_tokens, self.stall, self.times = max_tokens, stall, times
        self.fixed = None if fixed is None else min(fixed, max_tokens)
        self._limit = max_tokens

    def limit(self, step_tokens: int, stall: float | None) -> None:
        """Sets the number of tokens in a step, at most `max_tokens`, and `stall` for the next steps."""
        self._limit, self.stall = min(step_tokens, self.max_tokens), stall

    def tokens(self, decoding: int) -> int:
        """Returns the number of prompt tokens for a step with `decoding` decoding rows."""
        if not decoding or self.stall is None:
            return max(self.fixed or 1, self._limit - decoding)
        plain, each = self.times.decode(decoding), self.times.prompt
        if plain is None or not each:
            return max(self.fixed or 1, min(self._limit, _UNKNOWN))
        return max(self.fixed or MIN_TOKENS, min(self._limit, int((self.stall - 1) * plain / each)))

    def spare(self, decoding: int) -> float | None:
        """Returns by how many seconds something else than prompt tokens may delay the next step of `decoding` decoding rows,
        0.0 before times have been measured; None: there is no limit."""
        if not decoding or self.stall is None:
            return None
        return (self.stall - 1) * (self.times.decode(decoding) or 0.0)

    def part(self, start: int, missing: int, room: int) -> int:
        """Returns how many tokens of a prompt to process in a step; 0: the prompt waits.

        Args:
            start: number of its tokens that have been processed.
            missing: number of its tokens that have not.
            room: number of prompt tokens that the step has room for.
        """
        if self.fixed is None:
            return min(missing, room)
        count = min(missing, self.fixed - start % self.fixed)
        return count if count <= room else 0
