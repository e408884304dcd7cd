"""Which blocks a cache may release early if every layer attends to a window and attention sinks only. No torch."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 32  # the same on every backend, and DSO_BLOCK_TOKENS in dso.h


@dataclass(frozen=True)
class Forgetting:
    """Sliding-window attention with sinks, in tokens.

    Attributes:
        window: latest tokens that a token attends to, itself included.
        sinks: tokens at the beginning that every token attends to.
        spare: tokens before the window that are kept nevertheless: rejected drafts are cropped, MTP layers lag a little, and
            the next question about a text branches off where the last question began.
    """

    window: int
    sinks: int
    spare: int = 512

    @property
    def sink_blocks(self) -> int:
        """Blocks at the beginning that are never released."""
        return -(-self.sinks // BLOCK_TOKENS)

    def first_seen(self, tokens: int) -> int:
        """The first block after the sinks that the token after `tokens` tokens attends to."""
        return max(0, tokens + 1 - self.window) // BLOCK_TOKENS

    def first_kept(self, tokens: int) -> int:
        """The first block after the sinks that is kept."""
        return self.first_seen(max(0, tokens - self.spare))

    def blocks(self, step: int) -> int:
        """Maximum number of blocks that a sequence holds, whatever its length, with steps of `step` tokens."""
        return self.sink_blocks + -(-(self.window + self.spare + step) // BLOCK_TOKENS) + 1
