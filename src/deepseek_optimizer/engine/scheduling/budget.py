"""How many prompt tokens a step may have beside those that decode, so that a long prompt does not stall the others' streams.

A step of d decoding rows takes t(d) seconds, and a prompt token adds s. With `stall` = r a step may take r t(d): so prompts get
(r - 1) t(d) / s tokens, and alone as many as fit a step. Both times are measured as steps go by. No torch.
"""

from __future__ import annotations

from .step_times import StepTimes

LEAST = 8  # tokens: fewer would read all weights for next to nothing
_UNKNOWN = 64  # tokens, before times are known


class PromptBudget:
    """
    Args:
        most: tokens of a step at most.
        stall: how many times as long as without them a step with prompt tokens may take; None: no matter.
        fixed: tokens that prompts are always cut into, whatever else runs: for models whose arithmetic depends on where a
            prompt is cut; None: any.
    """

    def __init__(self, most: int, stall: float | None, times: StepTimes, fixed: int | None = None) -> None:
        self.most, self.stall, self.times = most, stall, times
        self.fixed = None if fixed is None else min(fixed, most)

    def tokens(self, decoding: int) -> int:
        """Prompt tokens of a step in which so many rows decode."""
        if not decoding or self.stall is None:
            return max(self.fixed or 1, self.most - decoding)
        plain, each = self.times.decode(decoding), self.times.prompt
        if plain is None or not each:
            return max(self.fixed or 1, min(self.most, _UNKNOWN))
        return max(self.fixed or LEAST, min(self.most, int((self.stall - 1) * plain / each)))

    def part(self, start: int, missing: int, room: int) -> int:
        """Tokens of a prompt that go into a step with so much room left, from token `start` on; 0: it waits."""
        if self.fixed is None:
            return min(missing, room)
        count = min(missing, self.fixed - start % self.fixed)
        return count if count <= room else 0
