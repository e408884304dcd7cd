"""What a cache may forget where every layer of a model sees a window and sinks: blocks that no later token sees. No torch."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 32  # the same on every backend, and DSO_BLOCK_TOKENS in dso.h


@dataclass(frozen=True)
class Forgetting:
    """
    Attributes:
        window: latest tokens that a token sees, itself among them.
        sinks: tokens at the beginning that every token sees.
        spare: tokens before the window that are kept all the same: drafts fall and are taken back, MTP layers come a little
            behind, and what is asked next about a text parts with it where the last question began.
    """

    window: int
    sinks: int
    spare: int = 512

    @property
    def sink_blocks(self) -> int:
        """Blocks at the beginning that stay."""
        return -(-self.sinks // BLOCK_TOKENS)

    def first_seen(self, tokens: int) -> int:
        """Of a sequence of so many tokens the first block, behind the sinks', that the next token sees."""
        return max(0, tokens + 1 - self.window) // BLOCK_TOKENS

    def first_kept(self, tokens: int) -> int:
        """The first block, behind the sinks', that is kept."""
        return self.first_seen(max(0, tokens - self.spare))

    def blocks(self, step: int) -> int:
        """Blocks that a sequence holds at most, however long it is, while steps of `step` tokens are run."""
        return self.sink_blocks + -(-(self.window + self.spare + step) // BLOCK_TOKENS) + 1
