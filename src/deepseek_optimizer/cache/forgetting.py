"""Which blocks a cache may release early if layers attend to a window and attention sinks only. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 32  # the same on every backend, and DSO_BLOCK_TOKENS in dso.h
SPARE = 512
SPARE_OF_COPIES = 256  # fewer, because they are added to a cache that is chosen for its size


@dataclass(frozen=True)
class Forgetting:
    """Sliding-window attention with sinks, in tokens.

    Attributes:
        window: latest tokens that a token attends to, itself included.
        sinks: tokens at the beginning that every token attends to.
        spare: tokens before the window that are kept nevertheless: rejected drafts are cropped, MTP layers lag a little, and
            the next question about a text branches off where the last question began.
        copies: whether these are copies of the newest tokens, whose layers are in another group.
    """

    window: int
    sinks: int
    spare: int = SPARE
    copies: bool = False

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


Groups = tuple[Forgetting | None, ...]  # for each group of layers; None: its layers may attend to every token


def kept_whole(groups: Groups) -> Groups:
    """The groups for sequences that release blocks of no layer early: those of copies still do."""
    return tuple(forgetting if forgetting is not None and forgetting.copies else None for forgetting in groups)


def widest(groups: Sequence[Forgetting | None]) -> Forgetting | None:
    """Which tokens the layers of no group attend to; None: those of one may attend to every token."""
    own = [forgetting for forgetting in groups if forgetting is not None]
    if len(own) < len(groups):
        return None
    return Forgetting(max(f.window for f in own), max(f.sinks for f in own), max(f.spare for f in own))


def max_blocks(groups: Sequence[Forgetting | None], tokens: int, step: int) -> int:
    """Maximum number of blocks, of all groups together, that a sequence holds until it has `tokens` tokens.

    Args:
        groups: the groups.
        tokens: tokens of the sequence.
        step: maximum number of tokens added at once.
    """
    blocks = -(-tokens // BLOCK_TOKENS)
    return sum(blocks if forgetting is None else min(blocks, forgetting.blocks(step)) for forgetting in groups)


def max_tokens(groups: Sequence[Forgetting | None], blocks: int, step: int, limit: int) -> int:
    """The largest number of tokens, at most `limit`, of a sequence that never holds more than `blocks` blocks; in whole blocks
    if it is below the limit. `groups` and `step` as in `max_blocks`."""
    growing = len(groups)
    for bound in sorted(forgetting.blocks(step) for forgetting in groups if forgetting is not None):
        if bound * growing > blocks:
            break
        blocks, growing = blocks - bound, growing - 1
    return limit if growing == 0 else min(limit, blocks // growing * BLOCK_TOKENS)
